// Show guidelines written in Markdown: headings, lists, paragraphs, bold, italic, code. Text nodes only.

import { make } from "./dom.js";
import { appendText } from "./text.js";

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)|\[([^\]\n]+)\]\(([^)\s]+)\)/g;

/** Append one line's text with its bold, italic and code; a link is shown as text and address. */
function appendInline(parent, text) {
  let done = 0;
  for (const match of text.matchAll(INLINE)) {
    appendText(parent, text.slice(done, match.index));
    done = match.index + match[0].length;
    if (match[4]) appendText(parent, `${match[4]} (${match[5]})`);
    else {
      const [tag, cut] = match[1] ? ["code", 1] : match[2] ? ["strong", 2] : ["em", 1];
      const element = make(tag);
      appendText(element, match[0].slice(cut, -cut));
      parent.append(element);
    }
  }
  appendText(parent, text.slice(done));
  return parent;
}

/** Return the element of one block: a heading, a list, a code block or a paragraph. */
function blockElement(block) {
  const lines = block.split("\n");
  const heading = lines[0].match(/^(#{1,4})\s+(.*)/);
  if (heading) {
    // the page's own headings are levels 1 and 2
    const title = appendInline(make("h" + Math.min(heading[1].length + 2, 6)), heading[2]);
    const rest = lines.slice(1).join("\n").trim();
    return rest ? make("div", {}, title, blockElement(rest)) : title;
  }
  if (/^(-{3,}|\*{3,})$/.test(block.trim())) return make("hr");
  const marker = /^\s*(?:[-*+]|(\d+)[.)])\s+/;
  const first = lines[0].match(marker);
  if (first) {
    const list = make(first[1] ? "ol" : "ul");
    for (const line of lines) {
      if (marker.test(line)) list.append(make("li", { text: "" }));
      const item = list.lastChild;
      const start = item.hasChildNodes() ? " " : "";
      appendInline(item, start + line.replace(marker, "").trim());
    }
    return list;
  }
  return appendInline(make("p"), lines.map((line) => line.trim()).join(" "));
}

/** Return an element that shows a Markdown text. */
export function renderMarkdown(markdown) {
  const root = make("div", { class: "markdown" });
  // every second part lies between fences
  markdown.replace(/\r\n?/g, "\n").split(/^```[^\n]*\n?/m).forEach((part, i) => {
    if (i % 2 === 1) {
      const code = make("pre");
      appendText(code, part.replace(/\n$/, ""));
      root.append(code);
      return;
    }
    const blocks = part.replace(/<!--[\s\S]*?-->/g, "").split(/\n\s*\n/).filter((block) => block.trim() !== "");
    root.append(...blocks.map((block) => blockElement(block.trim())));
  });
  return root;
}
