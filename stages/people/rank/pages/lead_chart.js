// Small pictures, made of elements: a bar a day, and a share with its interval.

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  if (text !== null) element.textContent = text;
  return element;
}

/** Return a bar chart of rankings a day, with a sentence for screen readers. */
export function dayChart(days) {
  const [width, height, bottom, top] = [720, 160, 130, 26];
  const most = Math.max(1, ...days.map((day) => day.rankings));
  const step = width / Math.max(1, days.length);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const total = days.reduce((sum, day) => sum + day.rankings, 0);
  svg.setAttribute("aria-label", `${total} rankings on the last ${days.length} days, at most ${most} on one day`);
  days.forEach((day, i) => {
    const size = (bottom - top) * day.rankings / most;
    if (day.rankings > 0) {
      svg.append(draw("rect", { class: "bar", x: i * step + step * 0.15, y: bottom - size, width: step * 0.7, height: size, rx: 3 }),
        draw("text", { class: "count", x: (i + 0.5) * step, y: bottom - size - 5, "text-anchor": "middle" }, day.rankings));
    }
    svg.append(draw("text", { x: (i + 0.5) * step, y: height - 6, "text-anchor": "middle" }, String(Number(day.day.slice(8)))));
  });
  svg.append(draw("line", { class: "axis", x1: 0, x2: width, y1: bottom, y2: bottom }));
  return svg;
}

/**
 * Return a share between 0 and 1 as a dot on a line, with its interval and what chance would give.
 * The numbers stand beside it, so screen readers pass over it.
 */
export function intervalPicture(estimate, chance = null) {
  const [width, height] = [120, 14];
  const at = (share) => 4 + (width - 8) * Math.min(1, Math.max(0, share));
  const svg = draw("svg", { class: "interval", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  svg.append(draw("line", { class: "track", x1: at(0), x2: at(1), y1: 7, y2: 7 }));
  if (estimate.ci95) svg.append(draw("line", { class: "range", x1: at(estimate.ci95[0]), x2: at(estimate.ci95[1]), y1: 7, y2: 7 }));
  if (chance !== null) svg.append(draw("line", { class: "chance", x1: at(chance), x2: at(chance), y1: 1, y2: 13 }));
  svg.append(draw("circle", { class: "dot", cx: at(estimate.value), cy: 7, r: 3.5 }));
  return svg;
}
