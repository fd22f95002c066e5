// Markdown to DOM, block by block, so that while an answer streams only its last block is made again.

import { copy, element, iconButton } from "./dom.js";
import { highlighted } from "./highlight.js";
import { inline } from "./inline.js";
import { formula } from "./math.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( {1,4})(?! )|( +)|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MATH = /^ {0,3}(\\\[|\$\$)/;
const DEEPEST = 12;

const sources = new WeakMap(); // what a top-level element was made from

// Makes `container` show `text`; elements whose source has not changed stay, with a selection in them.
export function showMarkdown(container, text) {
  const wanted = blocks(text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"), 0);
  const before = [...container.children];
  wanted.forEach((block, place) => {
    const there = before[place];
    if (there && sources.get(there) === block.source) return;
    const made = block.render();
    sources.set(made, block.source);
    if (there) there.replaceWith(made);
    else container.append(made);
  });
  before.slice(wanted.length).forEach((each) => each.remove());
}

// The blocks of some lines: {source, render(), apart}; `apart` says that an empty line separates it from the one before.
export function blocks(lines, depth) {
  const found = [];
  let place = 0;
  while (place < lines.length) {
    if (!lines[place].trim()) {
      place += 1;
      continue;
    }
    const [stop, render] = blockAt(lines, place, depth);
    const after = stop === lines.length ? "" : "\n"; // a block that ends is no longer what it was while it could grow
    const apart = place > 0 && !lines[place - 1].trim();
    found.push({ source: lines.slice(place, stop).join("\n") + after, render, apart });
    place = stop;
  }
  return found;
}

function blockAt(lines, place, depth) {
  const line = lines[place];
  if (FENCE.test(line)) return fenced(lines, place);
  const heading = HEADING.exec(line);
  if (heading) return [place + 1, () => element(`h${heading[1].length}`, {}, inline(heading[2] ?? ""))];
  if (RULE.test(line)) return [place + 1, () => element("hr")];
  if (MATH.test(line)) {
    const found = displayed(lines, place);
    if (found) return found;
  }
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, place, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, place, depth);
  if (line.includes("|") && TABLE_RULE.test(lines[place + 1] ?? "") && lines[place + 1].includes("-")) {
    const found = table(lines, place);
    if (found) return found;
  }
  return paragraph(lines, place, depth);
}

function interrupts(line, depth) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || MATH.test(line)) return true;
  return depth < DEEPEST && (QUOTE.test(line) || /^ {0,3}(?:[-*+]|1[.)]) +\S/.test(line));
}

function paragraph(lines, place, depth) {
  let stop = place + 1;
  while (stop < lines.length && lines[stop].trim() && !interrupts(lines[stop], depth)) stop += 1;
  const text = lines
    .slice(place, stop)
    .map((line) => line.trim())
    .join("\n");
  return [stop, () => element("p", {}, inline(text))];
}

function fenced(lines, place) {
  const [, fence, info] = FENCE.exec(lines[place]);
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  let stop = place + 1;
  while (stop < lines.length && !closing.test(lines[stop])) stop += 1;
  const indent = /^ */.exec(lines[place])[0].length;
  const text = lines
    .slice(place + 1, stop)
    .map((line) => line.replace(new RegExp(`^ {0,${indent}}`), ""))
    .join("\n");
  return [Math.min(stop + 1, lines.length), () => codeBlock(text, info.trim().split(/\s/)[0])];
}

function codeBlock(text, language) {
  const button = iconButton("copy", "Copy code", () => copy(text, button));
  return element(
    "div",
    { class: "code-block" },
    element("div", { class: "code-head" }, element("span", {}, language || "text"), button),
    element(
      "pre",
      { tabindex: "0", "aria-label": `Code${language ? `, ${language}` : ""}` },
      element("code", {}, highlighted(text, language)),
    ),
  );
}

function displayed(lines, place) {
  const opening = MATH.exec(lines[place])[1];
  const closing = opening === "$$" ? "$$" : "\\]";
  const first = lines[place].slice(lines[place].indexOf(opening) + 2);
  for (let stop = place; stop < Math.min(lines.length, place + 200); stop += 1) {
    const line = stop === place ? first : lines[stop];
    const end = line.indexOf(closing);
    if (end < 0) continue;
    if (line.slice(end + 2).trim()) return null;
    const text = [...(stop === place ? [] : [first, ...lines.slice(place + 1, stop)]), line.slice(0, end)].join("\n");
    return [stop + 1, () => element("div", { class: "display-math" }, formula(text, true))];
  }
  if (lines.length - place > 30) return null;
  const rest = lines.slice(place);
  if (rest.some((line) => !line.trim())) return null;
  return [
    lines.length,
    () => element("div", { class: "display-math" }, element("code", { class: "formula-source" }, rest.join("\n"))),
  ];
}

function quote(lines, place, depth) {
  let stop = place;
  while (stop < lines.length && lines[stop].trim() && (QUOTE.test(lines[stop]) || !interrupts(lines[stop], depth)))
    stop += 1;
  const inside = lines.slice(place, stop).map((line) => line.replace(QUOTE, ""));
  return [stop, () => element("blockquote", {}, ...blocks(inside, depth + 1).map((block) => block.render()))];
}

const indentOf = (line) => line.length - line.trimStart().length;

// The items of a list: lines each, without their indentation.
function list(lines, place, depth) {
  const [, before, marker] = ITEM.exec(lines[place]);
  const ordered = /\d/.test(marker);
  const inside = (lines) => blocks(lines, depth + 1);
  const items = [];
  let [stop, width] = [place, 0];
  for (; stop < lines.length; stop += 1) {
    const line = lines[stop];
    const item = ITEM.exec(line);
    if (!line.trim()) {
      const next = lines.slice(stop + 1, stop + 4).find((each) => each.trim());
      if (next === undefined || !(indentOf(next) >= width || sameList(next))) break;
      items.at(-1).push("");
    } else if (item && item[1].length < before.length + 2 && !RULE.test(line)) {
      if (!sameList(line)) break;
      width = item[0].length > 1 ? Math.min(item[0].length, item[1].length + 5) : 2;
      items.push([line.slice(item[0].length)]);
    } else if (indentOf(line) >= before.length + 2) items.at(-1).push(line.slice(Math.min(indentOf(line), width)));
    else if (lines[stop - 1].trim() && !interrupts(line, depth)) items.at(-1).push(line);
    else break;
  }
  while (stop > place && !lines[stop - 1].trim()) stop -= 1;
  const start = ordered && parseInt(marker, 10) !== 1 ? { start: String(parseInt(marker, 10)) } : {};
  return [
    stop,
    () => {
      const parts = items.map((item) => inside(item.map(withoutTask)));
      const loose =
        parts.some((part) => part.some((block, number) => number && block.apart)) ||
        items.slice(0, -1).some((item) => item.length > 1 && item.at(-1) === "");
      return element(
        ordered ? "ol" : "ul",
        start,
        ...items.map((item, number) => listItem(item[0], parts[number], loose)),
      );
    },
  ];

  function sameList(line) {
    const item = ITEM.exec(line);
    return item && item[1].length < before.length + 2 && item[2].at(-1) === marker.at(-1) && !RULE.test(line);
  }
}

const TASK = /^\[([ xX])\] /;
const withoutTask = (line, number) => (number === 0 ? line.replace(TASK, "") : line);

// In a tight list, without empty lines, paragraphs are not set apart.
function listItem(first, parts, loose) {
  const made = parts.map((block) => block.render());
  const children = made.flatMap((each) => (each.tagName === "P" && !loose ? [...each.childNodes] : [each]));
  const task = TASK.exec(first);
  if (!task) return element("li", {}, ...children);
  const box = element("input", {
    type: "checkbox",
    disabled: true,
    checked: task[1] !== " ",
    "aria-label": task[1] === " " ? "to do" : "done",
  });
  return element("li", { class: "task" }, box, " ", ...children);
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// Where the cells of a column stand, by the colons of its rule.
function side(rule) {
  if (rule.endsWith(":")) return rule.startsWith(":") ? "center" : "right";
  return rule.startsWith(":") ? "left" : "";
}

function table(lines, place) {
  const head = cells(lines[place]);
  const sides = cells(lines[place + 1]).map(side);
  if (head.length !== sides.length) return null;
  let stop = place + 2;
  while (stop < lines.length && lines[stop].trim() && lines[stop].includes("|")) stop += 1;
  const body = lines.slice(place + 2, stop).map(cells);
  const row = (tag, texts) =>
    element(
      "tr",
      {},
      ...head.map((_, column) =>
        element(
          tag,
          { class: sides[column] ? `to-${sides[column]}` : false, scope: tag === "th" ? "col" : false },
          inline(texts[column] ?? ""),
        ),
      ),
    );
  return [
    stop,
    () =>
      element(
        "div",
        { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table" },
        element(
          "table",
          {},
          element("thead", {}, row("th", head)),
          element("tbody", {}, ...body.map((each) => row("td", each))),
        ),
      ),
  ];
}
