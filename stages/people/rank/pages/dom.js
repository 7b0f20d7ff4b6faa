// Make elements. Text only ever becomes text nodes: nothing here parses markup.

/**
 * Return a new element.
 * @param {string} tag
 * @param {object} props `class`, `on` (event → listener), `text`; properties of the element
 *   (`disabled`, `checked`, `value`, …) and attributes with a hyphen or unknown to the element
 * @param {...(Node|string|null)} children null is left out
 */
export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name in element && !name.includes("-") && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return a button that does not submit forms. */
export function button(text, onClick, props = {}) {
  return make("button", { type: "button", text, on: { click: onClick }, ...props });
}

/** Put children in the place of all that an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Say a sentence to people who use a screen reader, without moving the focus. */
export function say(sentence) {
  document.getElementById("live").textContent = sentence;
}

/**
 * Open a dialog and return it; it is removed when it closes, and the focus goes back to where it
 * was.
 */
export function openDialog(title, className, ...children) {
  const before = document.activeElement;
  const heading = make("h2", { text: title, id: "dialog-title" });
  const close = button("Close", () => dialog.close(), { class: "quiet close" });
  const dialog = make("dialog", { class: className, "aria-labelledby": "dialog-title" },
    make("div", { class: "dialog-head" }, heading, close), ...children);
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (before && before.isConnected) before.focus();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
