// LaTeX as models write it, to MathML, which browsers draw by themselves. What is not known is shown as it was written.

import { element } from "./dom.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
const DEEPEST = 40;
const LONGEST = 5000;

const LETTERS =
  "alpha:α beta:β gamma:γ delta:δ epsilon:ϵ varepsilon:ε zeta:ζ eta:η theta:θ vartheta:ϑ iota:ι kappa:κ " +
  "lambda:λ mu:μ nu:ν xi:ξ pi:π rho:ρ sigma:σ tau:τ upsilon:υ phi:ϕ varphi:φ chi:χ psi:ψ omega:ω Gamma:Γ Delta:Δ " +
  "Theta:Θ Lambda:Λ Xi:Ξ Pi:Π Sigma:Σ Phi:Φ Psi:Ψ Omega:Ω infty:∞ partial:∂ nabla:∇ ell:ℓ hbar:ℏ emptyset:∅ " +
  "Re:ℜ Im:ℑ aleph:ℵ";
const SIGNS =
  "times:× cdot:⋅ div:÷ pm:± mp:∓ leq:≤ le:≤ geq:≥ ge:≥ neq:≠ ne:≠ approx:≈ equiv:≡ sim:∼ propto:∝ to:→ " +
  "rightarrow:→ leftarrow:← Rightarrow:⇒ implies:⟹ iff:⟺ Leftrightarrow:⇔ mapsto:↦ in:∈ notin:∉ subset:⊂ subseteq:⊆ " +
  "supset:⊃ cup:∪ cap:∩ setminus:∖ forall:∀ exists:∃ neg:¬ land:∧ lor:∨ wedge:∧ vee:∨ oplus:⊕ otimes:⊗ circ:∘ ast:∗ star:⋆ " +
  "mid:∣ parallel:∥ perp:⊥ angle:∠ ldots:… cdots:⋯ dots:… vdots:⋮ ddots:⋱ langle:⟨ rangle:⟩ lfloor:⌊ rfloor:⌋ lceil:⌈ rceil:⌉ " +
  "lvert:| rvert:| lVert:‖ rVert:‖ quad:\u2003 qquad:\u2003\u2003 ll:≪ gg:≫ therefore:∴ because:∵ prime:′ colon:: " +
  "{:{ }:} %:% $:$ &:& #:# _:_ |:‖ ,:\u2009 ;:\u2005 ::\u2005 !: \\s:\u00a0";
const LARGE =
  "sum:∑ prod:∏ int:∫ iint:∬ oint:∮ bigcup:⋃ bigcap:⋂ lim:lim max:max min:min sup:sup inf:inf argmax:arg\u2009max argmin:arg\u2009min";
const NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp det dim ker gcd deg arg Pr mod";
const ACCENTS = { hat: "^", bar: "¯", overline: "¯", tilde: "~", vec: "→", dot: "˙", ddot: "¨", widehat: "^" };
const FONTS = {
  mathbf: "bold",
  boldsymbol: "bold",
  mathrm: "normal",
  mathit: "italic",
  operatorname: "normal",
  mathbb: "bb",
  mathcal: "cal",
};
const BLACKBOARD = { R: "ℝ", N: "ℕ", Z: "ℤ", Q: "ℚ", C: "ℂ", P: "ℙ", E: "𝔼", F: "𝔽" };

const mapOf = (text) =>
  new Map(text.split(" ").map((pair) => [pair.slice(0, pair.indexOf(":", 1)), pair.slice(pair.indexOf(":", 1) + 1)]));
const [letters, signs, large] = [mapOf(LETTERS), mapOf(SIGNS), mapOf(LARGE)];
const names = new Set(NAMES.split(" "));

// Words in braces are one token, as their spaces count.
const TOKEN = /\\(?:text\w*|mbox|mathrm|operatorname\*?)\s*\{[^{}]*\}|\\[A-Za-z]+\*?|\\[\s\S]|\d+(?:\.\d+)?|\S/g;
const WORDS = /^\\(\w+)\*?\s*\{([^{}]*)\}$/;

class Unknown extends Error {}

function node(tag, attributes, ...children) {
  const made = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function formula(source, display) {
  const text = source.trim();
  try {
    if (text.length > LONGEST) throw new Unknown("too long");
    const parser = new Parser(text);
    const row = parser.row(() => false, 0);
    return node("math", { display: display ? "block" : "inline", "aria-label": text }, row);
  } catch (error) {
    if (!(error instanceof Unknown)) throw error;
    return element("code", { class: "formula-source", title: error.message }, text);
  }
}

class Parser {
  constructor(text) {
    this.tokens = text.match(TOKEN) ?? [];
    this.place = 0;
  }

  peek() {
    return this.tokens[this.place];
  }

  // Everything up to a token for which `ends` holds, as one row.
  row(ends, depth) {
    if (depth > DEEPEST) throw new Unknown("too deep");
    const children = [];
    while (this.place < this.tokens.length && !ends(this.peek())) children.push(this.scripts(depth));
    return children.length === 1 ? children[0] : node("mrow", {}, ...children);
  }

  scripts(depth) {
    const token = this.peek();
    const base = token === "^" || token === "_" ? node("mrow", {}) : this.atom(depth);
    const below = base.getAttribute("data-limits") === "true";
    let [sub, sup] = [null, null];
    for (;;) {
      const sign = this.peek();
      if (sign === "'") {
        this.place += 1;
        sup = node("mrow", {}, ...(sup ? [sup] : []), node("mo", {}, "′"));
      } else if ((sign === "_" && !sub) || (sign === "^" && !sup)) {
        this.place += 1;
        const value = this.atom(depth);
        if (sign === "_") sub = value;
        else sup = value;
      } else if (sign === "_" || sign === "^") throw new Unknown("two scripts");
      else break;
    }
    if (!sub && !sup) return base;
    const kind = below ? ["munder", "mover", "munderover"] : ["msub", "msup", "msubsup"];
    if (sub && sup) return node(kind[2], {}, base, sub, sup);
    return sub ? node(kind[0], {}, base, sub) : node(kind[1], {}, base, sup);
  }

  group(depth) {
    if (this.peek() !== "{") return this.atom(depth + 1);
    this.place += 1;
    const row = this.row((token) => token === "}", depth + 1);
    if (this.peek() !== "}") throw new Unknown("a brace is not closed");
    this.place += 1;
    return row;
  }

  // The letters of a group, as a name.
  words() {
    if (this.peek() !== "{") throw new Unknown("no text");
    this.place += 1;
    const words = [];
    while (this.peek() !== "}") {
      if (this.place >= this.tokens.length) throw new Unknown("a brace is not closed");
      words.push(this.peek());
      this.place += 1;
    }
    this.place += 1;
    return words.join("");
  }

  atom(depth) {
    if (depth > DEEPEST) throw new Unknown("too deep");
    const token = this.peek();
    if (token === undefined) throw new Unknown("something is missing at the end");
    if (token === "{") return this.group(depth);
    if (token === "}" || token === "&" || token === "^" || token === "_") throw new Unknown(`${token} out of place`);
    this.place += 1;
    const words = WORDS.exec(token);
    if (words)
      return /^(text|mbox)/.test(words[1])
        ? node("mtext", {}, words[2])
        : node("mi", { mathvariant: "normal" }, words[2]);
    if (token.startsWith("\\")) return this.command(token.slice(1), depth);
    if (/^\d/.test(token)) return node("mn", {}, token);
    if (/^\p{L}$/u.test(token)) return node("mi", {}, token);
    return node("mo", /[()[\]|]/.test(token) ? { stretchy: "false" } : {}, token === "-" ? "−" : token);
  }

  command(name, depth) {
    if (letters.has(name)) return node("mi", {}, letters.get(name));
    if (large.has(name))
      return node("mo", { "data-limits": String(!/int$/.test(name)), movablelimits: "true" }, large.get(name));
    if (names.has(name)) {
      const close = this.peek() === "(" || this.peek() === "\\left";
      return node("mo", { form: "prefix", lspace: "0.17em", rspace: close ? "0" : "0.17em" }, name);
    }
    if (/^\s$/.test(name)) return node("mspace", { width: "0.3em" });
    if (signs.has(name)) return node("mo", { stretchy: "false" }, signs.get(name));
    if (name in ACCENTS)
      return node("mover", { accent: "true" }, this.group(depth), node("mo", { stretchy: "false" }, ACCENTS[name]));
    if (name in FONTS) return this.font(FONTS[name]);
    switch (name) {
      case "frac":
      case "dfrac":
      case "tfrac":
        return node("mfrac", {}, this.group(depth), this.group(depth));
      case "binom":
        return node(
          "mrow",
          {},
          node("mo", {}, "("),
          node("mfrac", { linethickness: "0" }, this.group(depth), this.group(depth)),
          node("mo", {}, ")"),
        );
      case "sqrt":
        return this.root(depth);
      case "boxed":
        return node("mrow", { class: "boxed" }, this.group(depth));
      case "left":
        return this.fenced(depth);
      case "begin":
        return this.environment(depth);
      case "limits":
      case "displaystyle":
      case "textstyle":
      case "nonumber":
      case "big":
      case "Big":
      case "bigl":
      case "bigr":
      case "bigg":
      case "Bigl":
      case "Bigr":
        return node("mrow", {});
      default:
        throw new Unknown(`\\${name} is not known`);
    }
  }

  font(kind) {
    const text = this.peek() === "{" ? this.words() : (this.tokens[this.place++] ?? "");
    if (text.includes("\\")) throw new Unknown("a command inside of a font");
    if (kind === "bb")
      return node("mi", { mathvariant: "normal" }, [...text].map((letter) => BLACKBOARD[letter] ?? letter).join(""));
    return node("mi", { class: `math-${kind}`, ...(kind === "cal" ? {} : { mathvariant: "normal" }) }, text);
  }

  root(depth) {
    if (this.peek() !== "[") return node("msqrt", {}, this.group(depth));
    this.place += 1;
    const index = this.row((token) => token === "]", depth + 1);
    this.place += 1;
    return node("mroot", {}, this.group(depth), index);
  }

  delimiter() {
    const token = this.tokens[this.place++];
    if (token === undefined) throw new Unknown("no delimiter");
    if (token === ".") return "";
    if (!token.startsWith("\\")) return token;
    if (!signs.has(token.slice(1))) throw new Unknown(`${token} is no delimiter`);
    return signs.get(token.slice(1));
  }

  fenced(depth) {
    const opening = this.delimiter();
    const inside = this.row((token) => token === "\\right", depth + 1);
    if (this.peek() !== "\\right") throw new Unknown("\\left without \\right");
    this.place += 1;
    return node("mrow", {}, node("mo", {}, opening), inside, node("mo", {}, this.delimiter()));
  }

  // Matrices, cases and aligned lines are tables.
  environment(depth) {
    const name = this.words().replace("*", "");
    const fences = {
      matrix: ["", ""],
      pmatrix: ["(", ")"],
      bmatrix: ["[", "]"],
      vmatrix: ["|", "|"],
      cases: ["{", ""],
      aligned: ["", ""],
      align: ["", ""],
      array: ["", ""],
      gathered: ["", ""],
      equation: ["", ""],
    }[name];
    if (!fences) throw new Unknown(`the environment ${name} is not known`);
    if (name === "array") this.words();
    const rows = [[]];
    while (this.peek() !== "\\end") {
      if (this.place >= this.tokens.length) throw new Unknown("\\begin without \\end");
      const inside = this.row((token) => token === "&" || token === "\\\\" || token === "\\end", depth + 1);
      rows.at(-1).push(node("mtd", name === "cases" || name.startsWith("align") ? { class: "math-left" } : {}, inside));
      if (this.peek() === "&") this.place += 1;
      else if (this.peek() === "\\\\") {
        this.place += 1;
        rows.push([]);
      }
    }
    this.place += 1;
    this.words();
    const table = node("mtable", {}, ...rows.filter((row) => row.length).map((row) => node("mtr", {}, ...row)));
    return node("mrow", {}, node("mo", {}, fences[0]), table, node("mo", {}, fences[1]));
  }
}
