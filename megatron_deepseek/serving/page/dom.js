// Makes elements. Text becomes text nodes and nothing is ever parsed as HTML: what a model writes cannot become markup.

const SVG = "http://www.w3.org/2000/svg";

// element("a", {class: "x", href: "y", onclick: f}, "text", node, ...); false, null and undefined are left out.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children) if (child !== null && child !== undefined && child !== false) made.append(child);
  return made;
}

// A picture of the sprite at the top of index.html; it is decoration, so that its button needs a label.
export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("class", "icon");
  picture.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  picture.append(use);
  return picture;
}

export function iconButton(name, label, onclick, attributes = {}) {
  return element(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes },
    icon(name),
  );
}

export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element #${id}`);
  return found;
}

// Copies text and says so on the button for a moment. Without https or localhost browsers hide navigator.clipboard.
export async function copy(text, button) {
  let done = true;
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else done = copyBySelection(text);
  } catch {
    done = copyBySelection(text);
  }
  const before = button.getAttribute("aria-label");
  const picture = button.querySelector("use");
  const name = picture.getAttribute("href");
  if (button.classList.contains("told")) return;
  button.setAttribute("aria-label", done ? "Copied" : "Could not copy");
  picture.setAttribute("href", done ? "#icon-check" : "#icon-close");
  button.classList.add("told");
  setTimeout(() => {
    button.setAttribute("aria-label", before);
    picture.setAttribute("href", name);
    button.classList.remove("told");
  }, 1600);
}

function copyBySelection(text) {
  const area = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  const focused = document.activeElement;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
