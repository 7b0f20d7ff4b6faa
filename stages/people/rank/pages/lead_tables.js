// What the figures look like: tiles, who stands out, tables of labelers, of each two, of skips.

import { button, make } from "./dom.js";
import { dayChart, intervalPicture } from "./lead_chart.js";
import { appendText } from "./text.js";

const MOST_PAIRS = 30;

/** Return a text of a person as an element in which nothing is markup. */
export function words(text, tag = "span") {
  const element = make(tag);
  appendText(element, text);
  return element;
}

const percent = (share) => `${Math.round(100 * share)} %`;
const decimal = (value) => (Math.round(100 * value) / 100 || 0).toFixed(2); // no -0.00
const range = ([low, high]) => `${Math.round(100 * low)} to ${Math.round(100 * high)}`;
const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

function time(seconds) {
  return seconds < 120 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

/** Return a cell with a share, its interval in words and as a picture; chance as a red mark. */
function shareCell(estimate, chance = null) {
  if (!estimate) return make("td", { class: "figure" }, make("span", { class: "soft", text: "no data" }));
  const beside = chance === null ? "" : `, chance ${percent(chance)}`;
  return make("td", { class: "figure" }, percent(estimate.value), make("small", { text: `${range(estimate.ci95)}${beside}` }),
    intervalPicture(estimate, chance));
}

function correlationCell(estimate) {
  if (!estimate) return make("td", { class: "figure" }, make("span", { class: "soft", text: "no data" }));
  const ends = estimate.ci95 ? estimate.ci95.map(decimal).join(" to ") : "one task";
  return make("td", { class: "figure" }, decimal(estimate.value), make("small", { text: ends }));
}

function secondsCell(seconds) {
  if (!seconds) return make("td", { class: "figure" }, make("span", { class: "soft", text: "no data" }));
  return make("td", { class: "figure" }, time(seconds.median), make("small", { text: `half: ${time(seconds.quartiles[0])} to ${time(seconds.quartiles[1])}` }));
}

/** Return a table in a box that scrolls by itself, reachable by the keyboard. */
export function tableBox(caption, note, heads, rows) {
  return make("div", { class: "box", tabIndex: 0, role: "region", "aria-label": caption },
    make("table", {}, make("caption", { text: caption }, note ? make("small", { text: note }) : null),
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col", text: head })))),
      make("tbody", {}, ...rows)));
}

function tile(name, value, more) {
  return make("div", { class: "tile" }, make("dt", { text: name }), make("dd", {}, value, make("small", { text: more })));
}

/** Show how far the collection is. */
export function progressSection({ progress, labelers, all }) {
  const { decisions, days } = progress;
  const working = labelers.filter((one) => one.state === "active").length;
  const rankings = decisions.pending + decisions.accepted;
  const seconds = all.seconds ? time(all.seconds.median) : "no data";
  const gave = progress.given_up ? `, ${progress.given_up} skipped for good` : "";
  return make("section", { "aria-labelledby": "progress" }, make("h2", { id: "progress", text: "How far it is" }),
    make("dl", { class: "tiles" },
      tile("Tasks finished", `${progress.finished.toLocaleString("en")} of ${progress.tasks.toLocaleString("en")}`, `${progress.open} in work${gave}`),
      tile("Rankings wanted", `${progress.made.toLocaleString("en")} of ${progress.wanted.toLocaleString("en")}`, "some tasks go to several people"),
      tile("Rankings that count", rankings.toLocaleString("en"), `${decisions.accepted} accepted, ${decisions.pending} pending`),
      tile("Left out", (decisions.excluded + decisions.sent_back).toLocaleString("en"), `${decisions.excluded} excluded, ${decisions.sent_back} sent back`),
      tile("Skipped", decisions.skipped.toLocaleString("en"), all.skipped ? `${percent(all.skipped.value)} of the tasks handed in` : "none handed in yet"),
      tile("Labelers", labelers.length.toLocaleString("en"), `${working} may go on`),
      tile("Time a task", seconds, all.seconds ? `half: ${time(all.seconds.quartiles[0])} to ${time(all.seconds.quartiles[1])}` : "median")),
    make("figure", { class: "chart" }, make("figcaption", { text: `Rankings a day, ${days[0].day} to ${days[days.length - 1].day}` }), dayChart(days)));
}

/** Show who stands out, and why. */
export function outlierSection({ labelers }, act) {
  const found = labelers.filter((one) => one.outliers.length > 0);
  const section = make("section", { "aria-labelledby": "outliers" }, make("h2", { id: "outliers", text: "Who stands out" }));
  if (found.length === 0) {
    section.append(make("p", { class: "fine", text: "Nobody. A labeler is named from 8 rankings on, if the figures differ from chance or from the others by more than chance explains." }));
    return section;
  }
  section.append(make("ul", { class: "outliers" }, ...found.map((one) => make("li", {},
    make("h3", {}, words(who(one))), make("ul", {}, ...one.outliers.map((reason) => make("li", { text: reason }))),
    make("div", { class: "row" }, named(button("Look at the rows", () => act.look(one.id)), who(one)),
      named(button("Exclude all …", () => act.all(one, "excluded")), who(one)),
      named(button("Send all back …", () => act.all(one, "sent_back")), who(one)))))));
  return section;
}

/** Return how a labeler is called: by code, and by name if that is another. */
export function who(labeler) {
  return labeler.name && labeler.name !== labeler.code ? `${labeler.code} (${labeler.name})` : labeler.code;
}

/** Add to a button, for screen readers, what it acts on. */
export function named(element, what) {
  element.append(make("span", { class: "only-read" }, " ", words(what)));
  return element;
}

function head(labeler) {
  return make("th", { scope: "row" }, words(labeler.code), make("small", {}, words(labeler.name)));
}

/** Show what each labeler has done, and what can be done about it. */
export function labelerSection({ labelers, all, agreement }, act) {
  const section = make("section", { "aria-labelledby": "labelers" }, make("h2", { id: "labelers", text: "Labelers" }));
  if (labelers.length === 0) {
    section.append(make("p", { class: "fine", text: "Nobody has joined yet. Give people the address that the server printed for them." }));
    return section;
  }
  const judged = labelers.map((one) => make("tr", {}, head(one), ...figureCells(one.figures, one.figures.agreement)));
  if (labelers.length > 1) judged.unshift(make("tr", { class: "all" }, make("th", { scope: "row", text: "All" }), ...figureCells(all, agreement)));
  section.append(tableBox("What they have done", null,
    ["Labeler", "Pending", "Accepted", "Excluded", "Sent back", "Skipped", "Time a task", "All rows at once", "New tasks"],
    labelers.map((one) => workRow(one, act))),
  tableBox("How they judge",
    "95 % intervals over tasks. Pairs of answers that somebody tied are left out of agreement. The red mark is what chance would give; the longest answer may deserve to be best, so compare labelers.",
    ["Labeler", "Agrees with others", "Agrees with self", "Known answers right", "Ties", "First shown is best", "Longest is best", "Length and rank (ρ)", "Skips"],
    judged));
  return section;
}

function figureCells(figures, agreement) {
  return [
    shareCell(agreement, 0.5), shareCell(figures.self_agreement), shareCell(figures.known_accuracy), shareCell(figures.ties),
    shareCell(figures.first_best, figures.first_best?.expected), shareCell(figures.longest_best, figures.longest_best?.expected),
    correlationCell(figures.length_correlation), shareCell(figures.skipped),
  ];
}

function workRow(one, act) {
  const { decisions } = one;
  const some = Object.values(decisions).some((number) => number > 0);
  const stopped = one.state === "stopped";
  const choose = make("select", { "aria-label": `All rows of ${one.code}`, disabled: !some }, make("option", { value: "", text: "Choose …" }),
    ...[["accepted", "Accept what is pending"], ["excluded", "Exclude all"], ["sent_back", "Send all back"], ["pending", "Make all pending"]]
      .map(([value, text]) => make("option", { value, text })));
  choose.addEventListener("change", () => {
    const decision = choose.value;
    choose.value = "";
    if (decision) act.all(one, decision);
  });
  return make("tr", {}, head(one),
    ...["pending", "accepted", "excluded", "sent_back", "skipped"].map((name) => make("td", { text: String(decisions[name]) })),
    secondsCell(one.figures.seconds),
    make("td", {}, make("div", { class: "row" }, choose, named(button("Rows", () => act.look(one.id), { disabled: !some }), `of ${one.code}`))),
    make("td", {}, named(button(stopped ? "Let go on" : "Stop", () => act.labeler(one, stopped ? "active" : "stopped")), one.code),
      stopped ? make("small", { text: " gets no new tasks" }) : null));
}

/** Show how far labelers agree, all together and each two. */
export function agreementSection({ agreement, kendall, pairs }) {
  const section = make("section", { "aria-labelledby": "agreement" }, make("h2", { id: "agreement", text: "Agreement" }));
  if (!agreement) {
    section.append(make("p", { class: "fine", text: "No task has been ranked by two labelers yet, so there is nothing to compare. rank.overlap sets the share of tasks that several people get." }));
    return section;
  }
  section.append(make("dl", { class: "tiles" },
    tile("Pairs of answers ordered alike", percent(agreement.value), `${range(agreement.ci95)} %; ${count(agreement.n, "pair", "pairs")}; 50 % would be chance`),
    kendall ? tile("Kendall's τ-b between two labelers", decimal(kendall.value),
      `${kendall.ci95 ? `${kendall.ci95.map(decimal).join(" to ")}; ` : ""}0 is chance, 1 full agreement; ties count`) : null));
  const shown = pairs.slice(0, MOST_PAIRS).map((pair) => make("tr", {}, make("th", { scope: "row" }, words(pair.labelers.join(" and "))),
    shareCell(pair, 0.5), make("td", { text: pair.n.toLocaleString("en") }), make("td", { text: pair.clusters.toLocaleString("en") })));
  section.append(make("p", {}), tableBox("Agreement of each two labelers",
    `Pairs of answers that both judged and neither tied.${pairs.length > MOST_PAIRS ? ` The ${MOST_PAIRS} with the most in common, of ${pairs.length}.` : ""}`,
    ["Labelers", "Ordered alike", "Pairs of answers", "Tasks"], shown));
  return section;
}

/** Show why tasks were skipped. */
export function skipSection({ skips }) {
  if (skips.length === 0) return null;
  return make("section", { "aria-labelledby": "skips" }, make("h2", { id: "skips", text: "Skipped tasks" }),
    tableBox("Reasons for a skip", null, ["Reason", "Times"],
      skips.map((skip) => make("tr", {}, make("td", { class: "wrap" }, words(skip.reason)), make("td", { text: String(skip.count) })))));
}
