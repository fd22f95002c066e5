// Markdown inside of a line: emphasis, code, links, formulas. The time is linear in the text, whatever it is.

import { element } from "./dom.js";
import { formula } from "./math.js";

const SAFE = /^(https?:\/\/|mailto:)/i;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const SPECIAL = /[\\`*_~[!<$\n]|https?:\/\//g;
const EMPHASIS = { 1: "em", 2: "strong" };

export function inline(text, depth = 0) {
  const fragment = document.createDocumentFragment();
  for (const node of new Scanner(text, depth).nodes()) fragment.append(node);
  return fragment;
}

// A run of signs that has closed nothing is text.
const asNode = (each) => (each instanceof Node ? each : document.createTextNode(each.sign.repeat(each.count)));

class Scanner {
  constructor(text, depth) {
    this.text = text;
    this.depth = depth;
    this.place = 0;
    this.letters = ""; // plain text that is not yet a node
    this.made = []; // nodes, and runs of * _ ~ that may still open an emphasis
    this.openers = { "*": [], _: [], "~": [] }; // places in `made`
    this.missing = new Set(); // closing signs that the rest of the text does not have
  }

  nodes() {
    while (this.place < this.text.length) {
      SPECIAL.lastIndex = this.place;
      const next = SPECIAL.exec(this.text);
      const stop = next ? next.index : this.text.length;
      if (stop > this.place) this.plain(this.text.slice(this.place, stop));
      this.place = stop;
      if (next && !this.special(next[0])) {
        this.plain(this.text[this.place]);
        this.place += 1;
      }
    }
    this.flush();
    return this.made.map(asNode);
  }

  plain(text) {
    this.letters += text;
  }

  flush() {
    if (this.letters) this.made.push(document.createTextNode(this.letters));
    this.letters = "";
  }

  push(made) {
    this.flush();
    this.made.push(made);
  }

  // Takes what begins here, or returns false.
  special(sign) {
    switch (sign) {
      case "\\":
        return this.escaped();
      case "`":
        return this.code();
      case "[":
        return this.link(false);
      case "!":
        return this.text[this.place + 1] === "[" && this.link(true);
      case "<":
        return this.autolink();
      case "$":
        return this.dollars();
      case "\n":
        return this.lineBreak();
      case "*":
      case "_":
      case "~":
        return this.run(sign);
      default:
        return this.address();
    }
  }

  // The place of `closing` at or after `from`, -1 without; a search that failed once is not made again.
  find(closing, from) {
    if (this.missing.has(closing)) return -1;
    const found = this.text.indexOf(closing, from);
    if (found < 0) this.missing.add(closing);
    return found;
  }

  escaped() {
    const next = this.text[this.place + 1] ?? "";
    if (next === "(" || next === "[") {
      const stop = this.find(next === "(" ? "\\)" : "\\]", this.place + 2);
      if (stop > 0) return this.take(formula(this.text.slice(this.place + 2, stop), next === "["), stop + 2);
    }
    if (next === "\n") return this.take(element("br"), this.place + 2);
    if (!/[!-/:-@[-`{-~]/.test(next)) return false;
    this.plain(next);
    this.place += 2;
    return true;
  }

  take(node, place) {
    this.push(node);
    this.place = place;
    return true;
  }

  code() {
    const ticks = /^`+/.exec(this.text.slice(this.place, this.place + 100))[0];
    let stop = this.find(ticks, this.place + ticks.length);
    while (stop > 0 && (this.text[stop + ticks.length] === "`" || this.text[stop - 1] === "`")) {
      let after = stop;
      while (this.text[after] === "`") after += 1;
      stop = this.text.indexOf(ticks, after);
    }
    if (stop < 0) {
      this.plain(ticks);
      this.place += ticks.length;
      return true;
    }
    const inside = this.text.slice(this.place + ticks.length, stop).replaceAll("\n", " ");
    return this.take(
      element("code", {}, /^ .*\S.* $/.test(inside) ? inside.slice(1, -1) : inside),
      stop + ticks.length,
    );
  }

  // [text](address), and of ![text](address) a link too: a picture would ask another host for something.
  link(picture) {
    const start = this.place + (picture ? 2 : 1);
    const middle = this.find("](", start);
    if (middle < 0 || middle - start > 1000 || this.depth > 3) return false;
    const inside = this.text.slice(start, middle);
    if (inside.includes("[") || inside.includes("\n\n")) return false;
    const target = /^\(\s*<?((?:[^\s()<>]|\([^\s()<>]*\)){0,2000})>?(?:\s+["'][^"'\n]{0,200}["'])?\s*\)/.exec(
      this.text.slice(middle + 1, middle + 2300),
    );
    if (!target) return false;
    const label = inside || target[1];
    const shown = picture ? document.createTextNode(label) : inline(label, this.depth + 1);
    return this.take(anchor(target[1], shown), middle + 1 + target[0].length);
  }

  autolink() {
    const found = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/i.exec(this.text.slice(this.place, this.place + 2100));
    if (found) return this.take(anchor(found[1], found[1].replace(/^mailto:/i, "")), this.place + found[0].length);
    const line = /^<br\s*\/?>/i.exec(this.text.slice(this.place, this.place + 8));
    return line ? this.take(element("br"), this.place + line[0].length) : false;
  }

  address() {
    const found = /^https?:\/\/[^\s<>"'`*]{1,2000}/.exec(this.text.slice(this.place, this.place + 2010));
    if (!found) return false;
    let address = found[0].replace(/[.,;:!?]+$/, "");
    if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
    return this.take(anchor(address, address), this.place + address.length);
  }

  // $$...$$ and $...$, the latter only where it does not look like prices.
  dollars() {
    const twice = this.text.startsWith("$$", this.place);
    const start = this.place + (twice ? 2 : 1);
    const stop = this.find(twice ? "$$" : "$", start);
    if (stop <= start) return false;
    const inside = this.text.slice(start, stop);
    if (!twice && (/^\s|\s$|\n\n/.test(inside) || /[\d\w]/.test(this.text[stop + 1] ?? ""))) return false;
    return this.take(formula(inside, twice), stop + (twice ? 2 : 1));
  }

  lineBreak() {
    this.push(element("br"));
    this.place += 1;
    return true;
  }

  run(sign) {
    let stop = this.place;
    while (this.text[stop] === sign) stop += 1;
    const count = stop - this.place;
    const [before, after] = [this.text[this.place - 1] ?? " ", this.text[stop] ?? " "];
    const left = !/\s/.test(after) && (!PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before));
    const right = !/\s/.test(before) && (!PUNCTUATION.test(before) || /\s/.test(after) || PUNCTUATION.test(after));
    const word = sign === "_" && left && right;
    this.place = stop;
    if (sign === "~" && count !== 2) {
      this.plain(sign.repeat(count));
      return true;
    }
    let rest = count;
    if (right && !word) rest = this.close(sign, rest);
    if (rest && left && !word) {
      this.flush();
      this.openers[sign].push(this.made.length);
      this.made.push({ sign, count: rest });
    } else if (rest) this.plain(sign.repeat(rest));
    return true;
  }

  // Closes what `count` signs can close and returns how many are left.
  close(sign, count) {
    this.flush();
    while (count && this.openers[sign].length) {
      const place = this.openers[sign].at(-1);
      const opener = this.made[place];
      const used = sign === "~" ? 2 : Math.min(opener.count, count, 2);
      const children = this.made.splice(place + 1).map(asNode);
      for (const signs of Object.values(this.openers)) while (signs.at(-1) > place) signs.pop();
      opener.count -= used;
      if (!opener.count) {
        this.made.pop();
        this.openers[sign].pop();
      }
      const emphasis = element(sign === "~" ? "del" : EMPHASIS[used]);
      for (const child of children) emphasis.append(child);
      this.made.push(emphasis);
      count -= used;
    }
    return count;
  }
}

// A link that tells the other side nothing of this page. Other schemes (javascript:, data:) stay text.
function anchor(address, label) {
  if (!SAFE.test(address)) return element("span", { class: "dead-link", title: address }, label);
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, label);
}
