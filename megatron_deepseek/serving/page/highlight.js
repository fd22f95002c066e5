// Colours for code: comments, strings, numbers and keywords, of the languages that models write most.

import { element } from "./dom.js";

const LONGEST = 60000; // beyond it code stays plain
const C_LIKE =
  "break case catch class const continue default do else enum export extends false finally for function if " +
  "import in instanceof interface let new null return static super switch this throw true try typeof var void while " +
  "async await yield of type public private protected package struct union unsigned signed int long short char float " +
  "double bool auto namespace using template typename virtual override include define fn impl match mut pub use where " +
  "trait mod crate self func go chan defer range map select string val object when nullptr sizeof extern inline";
const PYTHON =
  "and as assert async await break class continue def del elif else except False finally for from global if " +
  "import in is lambda match case None nonlocal not or pass raise return True try while with yield self";
const SHELL =
  "if then else elif fi for in do done while until case esac function return export local set unset echo cd " +
  "source exit sudo";
const SQL =
  "select from where and or not insert into values update set delete create table drop alter join left right " +
  "inner outer on group by order having limit as distinct union all null is in like between primary key";

const STRING = String.raw`"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'`;
const NUMBER = String.raw`\b(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\w*\b`;
const WORD = String.raw`[A-Za-z_$][\w$]*`;

const FAMILIES = {
  c: {
    words: C_LIKE,
    comment: String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`,
    string: "`(?:\\\\.|[^`\\\\])*`|" + STRING,
  },
  python: {
    words: PYTHON,
    comment: "#[^\\n]*",
    string: String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|` + STRING,
  },
  shell: { words: SHELL, comment: String.raw`(?<![\w$])#[^\n]*`, string: STRING },
  sql: { words: SQL, comment: String.raw`--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`, string: STRING, anyCase: true },
  data: { words: "true false null yes no", comment: String.raw`(?<!\S)#[^\n]*`, string: STRING },
};
const NAMES = {
  c: "c h cpp c++ cc cuda cu java js javascript jsx ts typescript tsx go rust rs swift kotlin kt scala csharp cs php dart",
  python: "python py python3 ipython",
  shell: "bash sh shell zsh console dockerfile makefile make",
  sql: "sql sqlite postgresql mysql",
  data: "json yaml yml toml ini jsonl",
};
const FAMILY_OF = new Map(
  Object.entries(NAMES).flatMap(([family, names]) => names.split(" ").map((name) => [name, family])),
);

// The code as nodes: text, and spans of the classes comment, string, number and keyword.
export function highlighted(text, language) {
  const fragment = document.createDocumentFragment();
  const family = FAMILIES[FAMILY_OF.get(language.toLowerCase())];
  if (!family || text.length > LONGEST) {
    fragment.append(text);
    return fragment;
  }
  const words = new Set(family.words.split(" "));
  const pattern = new RegExp(
    `(?<comment>${family.comment})|(?<string>${family.string})|(?<number>${NUMBER})|(?<word>${WORD})`,
    "g",
  );
  let place = 0;
  for (const found of text.matchAll(pattern)) {
    const kind = kindOf(found.groups, words, family.anyCase);
    if (!kind) continue;
    fragment.append(text.slice(place, found.index), element("span", { class: `code-${kind}` }, found[0]));
    place = found.index + found[0].length;
  }
  fragment.append(text.slice(place));
  return fragment;
}

function kindOf(groups, words, anyCase) {
  if (groups.word === undefined)
    return groups.comment !== undefined ? "comment" : groups.string !== undefined ? "string" : "number";
  return words.has(anyCase ? groups.word.toLowerCase() : groups.word) ? "keyword" : null;
}
