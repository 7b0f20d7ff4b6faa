// Show a text that a model or a user wrote: as text nodes, with what is invisible made visible.

const NAMES = {
  0x00ad: "SHY", 0x034f: "CGJ", 0x061c: "ALM", 0x180e: "MVS", 0x200b: "ZWSP", 0x200c: "ZWNJ", 0x200d: "ZWJ",
  0x200e: "LRM", 0x200f: "RLM", 0x2028: "LS", 0x2029: "PS", 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO",
  0x202e: "RLO", 0x2060: "WJ", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM",
};
// Characters that show nothing or reorder what is around them: controls, soft hyphens, joiners, directional
// marks and overrides, fillers, tags, lone surrogates; and piles of more than four combining marks.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000B-\\u001F\\u007F-\\u009F\\u00AD\\u034F\\u061C\\u115F\\u1160\\u17B4\\u17B5\\u180B-\\u180F" +
  "\\u200B-\\u200F\\u2028-\\u202E\\u2060-\\u206F\\u2800\\u3164\\uFEFF\\uFFA0\\uFFF9-\\uFFFB\\u{E0000}-\\u{E0FFF}\\p{Cs}]+" +
  "|(?<=\\p{M}{4})\\p{M}+", "gu");
const JOINED_SCRIPTS = /[\p{Script=Arabic}\p{Script=Syriac}\p{Script=Mongolian}\p{Script=Devanagari}\p{Script=Bengali}\p{Script=Gurmukhi}\p{Script=Gujarati}\p{Script=Oriya}\p{Script=Tamil}\p{Script=Telugu}\p{Script=Kannada}\p{Script=Malayalam}\p{Script=Sinhala}\p{Script=Khmer}]/u;
const EMOJI = /[\p{Extended_Pictographic}\p{Emoji_Modifier}\uFE0F]/u;
const CHIPS_IN_A_ROW = 8;
const LONG = { characters: 3000, lines: 60 };
const PREVIEW = { characters: 2000, lines: 40 };

/** Tell whether a lone joiner does its proper work: in an emoji, or in a script that needs it. */
function isProperJoiner(run, before, after) {
  if (run !== "\u200c" && run !== "\u200d") return false;
  if (run === "\u200d" && EMOJI.test(before) && EMOJI.test(after)) return true;
  return JOINED_SCRIPTS.test(before) && JOINED_SCRIPTS.test(after);
}

/** Return the last or the first whole character of a text beside an index. */
function neighbours(text, start, end) {
  const low = text.charCodeAt(start - 1);
  const before = low >= 0xdc00 && low <= 0xdfff ? text.slice(start - 2, start) : text.slice(start - 1, start);
  const point = text.codePointAt(end);
  return [before, point === undefined ? "" : String.fromCodePoint(point)];
}

/** Return a visible mark for n equal invisible characters. */
function chip(point, count) {
  const code = "U+" + point.toString(16).toUpperCase().padStart(4, "0");
  const span = document.createElement("span");
  span.className = "hidden-character";
  span.title = `${count === 1 ? "An invisible character" : `${count} invisible characters`} (${code})`;
  span.textContent = (NAMES[point] || code) + (count > 1 ? ` ×${count}` : "");
  return span;
}

/** Append marks for a run of invisible characters, at most a few. */
function appendChips(parent, run) {
  if (/^\p{M}+$/u.test(run) && !/[\u034F\u180B-\u180F\u17B4\u17B5]/u.test(run)) {
    const span = document.createElement("span");
    span.className = "hidden-character";
    span.textContent = `+${[...run].length} combining marks`;
    parent.append(span);
    return;
  }
  const points = [...run].map((character) => character.codePointAt(0));
  let shown = 0;
  for (let i = 0; i < points.length;) {
    if (shown === CHIPS_IN_A_ROW) {
      const span = document.createElement("span");
      span.className = "hidden-character";
      span.textContent = `and ${points.length - i} more invisible characters`;
      parent.append(span);
      return;
    }
    let end = i;
    while (end < points.length && points[end] === points[i]) end += 1;
    parent.append(chip(points[i], end - i));
    shown += 1;
    i = end;
  }
}

/**
 * Append a text to an element: text nodes, and a visible mark in place of each invisible
 * character. Nothing in it is markup.
 */
export function appendText(parent, text) {
  const plain = String(text).replace(/\r\n?/g, "\n");
  let done = 0;
  for (const match of plain.matchAll(HIDDEN)) {
    const run = match[0];
    const end = match.index + run.length;
    if (isProperJoiner(run, ...neighbours(plain, match.index, end))) continue;
    if (match.index > done) parent.append(plain.slice(done, match.index));
    appendChips(parent, run);
    done = end;
  }
  if (done < plain.length) parent.append(plain.slice(done));
}

/** Append a text whose fenced code blocks are set in a fixed-width font, fences included. */
function appendWithCode(parent, text) {
  let block = [];
  let fence = null;
  const flush = (isCode) => {
    if (block.length === 0) return;
    const part = document.createElement(isCode ? "code" : "span");
    part.className = isCode ? "code-block" : "plain";
    appendText(part, block.join("\n") + (isCode ? "" : "\n"));
    parent.append(part);
    block = [];
  };
  for (const line of text.replace(/\r\n?/g, "\n").split("\n")) {
    const opens = line.match(/^ {0,3}(`{3,}|~{3,})/);
    if (fence === null && opens) {
      flush(false);
      fence = opens[1];
      block.push(line);
    } else if (fence !== null && opens && line.trim().startsWith(fence) && line.trim() === opens[1]) {
      block.push(line);
      flush(true);
      fence = null;
    } else block.push(line);
  }
  flush(fence !== null);
  const last = parent.lastChild;
  if (last && last.className === "plain" && last.lastChild && last.lastChild.nodeType === Node.TEXT_NODE) {
    last.lastChild.data = last.lastChild.data.replace(/\n$/, "");
  }
}

/** Return the beginning of a long text, at most so many characters and lines; or the text. */
function beginning(text) {
  const lines = text.split("\n");
  if (text.length <= LONG.characters && lines.length <= LONG.lines) return text;
  let cut = lines.slice(0, PREVIEW.lines).join("\n").slice(0, PREVIEW.characters);
  if (/[\uD800-\uDBFF]$/.test(cut)) cut = cut.slice(0, -1); // not through a pair of surrogates
  return cut;
}

/**
 * Return an element that shows a text; a long one is cut, with a button for the rest.
 * @param {string} text
 * @param {string} name what the text is, for the button ("answer A")
 */
export function textBlock(text, name) {
  const body = document.createElement("div");
  body.className = "text";
  const start = beginning(text);
  if (text.trim() === "") {
    const nothing = document.createElement("em");
    nothing.textContent = text === "" ? "(empty)" : "(only white space)";
    body.append(nothing);
  } else appendWithCode(body, start);
  const block = document.createElement("div");
  block.append(body);
  if (start === text) return block;
  const more = document.createElement("button");
  more.type = "button";
  more.className = "quiet more";
  const rest = (text.length - start.length).toLocaleString("en");
  const label = (open) => (open ? `Show less of ${name}` : `Show all of ${name}: ${rest} more characters`);
  more.textContent = label(false);
  more.setAttribute("aria-expanded", "false");
  body.classList.add("cut");
  more.addEventListener("click", () => {
    const open = more.getAttribute("aria-expanded") === "false";
    more.setAttribute("aria-expanded", String(open));
    more.textContent = label(open);
    body.classList.toggle("cut", !open);
    body.replaceChildren();
    appendWithCode(body, open ? text : start);
  });
  block.append(more);
  return block;
}

/** Return the first words of a text in one line, for a small label. */
export function snippet(text, length = 60) {
  const line = text.slice(0, 4 * length).replace(HIDDEN, " ").replace(/\s+/g, " ").trim();
  const characters = [...line];
  return characters.length > length ? characters.slice(0, length).join("") + "…" : line;
}
