// The lead's page: loads the figures, shows them, and sends what the lead decides.

import { button, fill, make, say } from "./dom.js";
import { makeRows, openMessage } from "./lead_rows.js";
import { agreementSection, labelerSection, outlierSection, progressSection, skipSection, who } from "./lead_tables.js";
import { ask, Refused } from "./net.js";

const PATIENCE = 120_000; // ms: figures of many thousand rankings take a while
const main = document.getElementById("main");
const state = document.getElementById("state");
const banners = document.getElementById("banners");
const figures = make("div");
const rows = makeRows(showError, () => loadFigures());
const withExcluded = make("input", { type: "checkbox", on: { change: () => loadFigures() } });
const FORMS = [["rankings", "Rankings (JSON lines)"], ["labelstudio", "Tasks for Label Studio"], ["argilla", "Tasks for Argilla"]];
const ALL = {
  accepted: ["Accept what is pending", "Its rankings that are pending count as accepted. Single decisions stay."],
  excluded: ["Exclude all", "None of these rankings trains anything, and the tasks go to others."],
  sent_back: ["Send all back", "The labeler gets all these tasks again, with your message. Until then they do not count."],
  pending: ["Make all pending", "All decisions on this labeler's rows are taken back."],
};
let asked = 0;

/** Say in a banner what went wrong; the way out depends on what it is. */
function showError(error) {
  const refused = error instanceof Refused;
  const ended = refused && [401, 403].includes(error.status);
  const text = ended ? "This page's session has ended. Open the lead's address, which the server printed, once more."
    : refused ? error.message : "The server does not answer. What is shown here may be old.";
  fill(banners, make("div", { class: `banner ${ended ? "closed" : "refused"}`, role: "alert" }, make("p", { text }),
    refused && !ended ? button("All right", () => banners.replaceChildren()) : button("Try again", () => loadAll())));
  state.textContent = "";
}

/** Ask for the figures and show them; the newest question wins. */
async function loadFigures() {
  asked += 1;
  const mine = asked;
  state.textContent = "Loading …";
  try {
    const found = await ask("GET", `/api/lead/figures?excluded=${withExcluded.checked ? 1 : 0}`, undefined, PATIENCE);
    if (mine !== asked) return;
    banners.replaceChildren();
    document.getElementById("about").textContent = `Experiment ${found.experiment}`;
    state.textContent = `As of ${new Date(1000 * found.made).toLocaleTimeString()}`;
    keepingFocus(figures, () => fill(figures, ...sections(found)));
    rows.people(found.labelers);
  } catch (error) {
    if (mine === asked) showError(error);
  }
}

function sections(found) {
  const act = { look: rows.look, all: decideOnAll, labeler: setLabeler };
  return [progressSection(found), outlierSection(found, act), labelerSection(found, act), agreementSection(found), skipSection(found)];
}

/** Do something that replaces an element's children, and give the focus to the same control after it. */
function keepingFocus(element, change) {
  const focused = document.activeElement;
  const order = element.contains(focused) ? [...element.querySelectorAll("button, select, .box")].indexOf(focused) : -1;
  change();
  if (order >= 0) [...element.querySelectorAll("button, select, .box")][order]?.focus();
}

async function loadAll() {
  await Promise.all([loadFigures(), rows.load()]);
}

/** Decide on all rows of a labeler, after a question. */
function decideOnAll(labeler, decision) {
  const [title, text] = ALL[decision];
  openMessage(`${title}: ${who(labeler)}`, text, title, async (message) => {
    try {
      const { changed } = await ask("POST", `/api/lead/labelers/${labeler.id}/verdicts`, { decision, message });
      say(`${labeler.code}: ${changed} rows changed.`);
      await loadAll();
    } catch (error) {
      showError(error);
    }
  }, decision === "sent_back" || decision === "excluded");
}

async function setLabeler(labeler, wanted) {
  try {
    await ask("POST", `/api/lead/labelers/${labeler.id}`, { state: wanted });
    say(`${labeler.code}: ${wanted === "stopped" ? "gets no new tasks" : "gets tasks again"}.`);
    await loadFigures();
  } catch (error) {
    showError(error);
  }
}

function showMenu() {
  const form = make("select", { "aria-label": "Form of the download" }, ...FORMS.map(([value, text]) => make("option", { value, text })));
  const link = make("a", { class: "download", text: "Download" });
  const point = () => {
    link.href = `/api/lead/download?format=${form.value}`;
  };
  form.addEventListener("change", point);
  point();
  fill(document.getElementById("menu"), make("label", { class: "choice" }, withExcluded, "Figures with excluded rows"),
    button("Update", () => loadAll()), form, link);
}

// the token has become a cookie: keep it out of the address bar and out of screenshots
if (location.search) history.replaceState(null, "", location.pathname);
showMenu();
fill(main, figures, rows.root);
loadAll();
