// Two versions side by side: curves of the jobs that made them, every field that differs, both cards.

import { get } from "../api.js";
import { Chart } from "../chart.js";
import { fill, h, section, table } from "../dom.js";
import { number, title, words } from "../format.js";
import { card, JOB } from "../parts.js";
import { Clock, Series } from "../series.js";

const CURVES = ["loss", "validation_loss", "return", "validation_return", "train_accuracy", "validation_accuracy", "mean_ponder_steps"];

export async function render({ main, parameters, query, signal, setTitle }) {
  const { kind } = parameters;
  const asked = new URLSearchParams({ a: query.get("a") ?? "", b: query.get("b") ?? "" });
  const { a, b, differences } = await get(`/api/compare/${kind}?${asked}`, signal);
  setTitle(`${a.name} and ${b.name}`);
  const curves = h("div", { class: "charts" }, h("p", { class: "loading" }, "Reading the curves of both jobs"));
  const fields = h("div");
  const everything = h("input", { type: "checkbox", onchange: () => draw() });
  const draw = () => fill(fields, rows(a, b, differences, everything.checked));
  draw();
  const link = (side) => h("a", { href: `/${kind}/${encodeURIComponent(side.name)}` }, side.name);
  fill(
    main,
    h("p", { class: "crumbs" }, h("a", { href: `/${kind}` }, title(kind))),
    h("h1", {}, link(a), " and ", link(b)),
    h("section", { "aria-labelledby": "curves" }, h("h2", { id: "curves" }, "Curves"), curves),
    section("Fields", h("label", { class: "field inline" }, everything, "Also what is the same in both"), fields),
    h("div", { class: "pair" }, [a, b].map((side) => section(`Card of ${side.name}`, side.card ? card(side.card) : h("p", { class: "empty" }, "This version has no card.")))),
  );
  await overlay(curves, kind, a, b, signal);
}

function rows(a, b, differences, everything) {
  const shown = differences.filter((one) => everything || one.change !== "same");
  const cell = (value) => (value === null ? "" : typeof value === "number" ? number(value) : typeof value === "string" ? h("span", { class: "clip", title: value }, value) : JSON.stringify(value));
  const signed = (one) => (one.difference === null ? h("span", { class: "muted" }, one.change) : `${one.difference > 0 ? "+" : ""}${number(one.difference)}`);
  return table(
    `Fields of ${a.name} and ${b.name}`,
    ["Field", a.name, b.name, ["Difference", "num"]],
    shown.map((one) => [[h("span", { class: "muted" }, `${words(one.section)} `), words(one.field)], cell(one.a), cell(one.b), signed(one)]),
    "They are the same in every field.",
  );
}

/** Draw a metric of both jobs in one plot, for every metric that both have. */
async function overlay(curves, kind, a, b, signal) {
  const service = kind === "models" ? "cognate" : "agent";
  const ask = async (side) => {
    if (!JOB.test(side.job)) return new Map();
    // A job may be gone, or its version was brought here without one.
    const found = await get(`/api/jobs/${service}/${side.job.replace("jobs/", "")}/metrics`, signal).catch(() => ({ series: [] }));
    return new Map(found.series.map((one) => [one.name, one]));
  };
  const [of_a, of_b] = await Promise.all([ask(a), ask(b)]);
  const shared = { axis: { kind: "step", clock: new Clock() }, marks: () => [], signal, key: "compare" };
  const charts = CURVES.filter((name) => of_a.has(name) && of_b.has(name)).map((name) => {
    const chart = new Chart({ title: title(name), names: ["a", "b"], labels: { a: a.name, b: b.name }, shared });
    return [chart, [new Series({ ...of_a.get(name), name: "a" }), new Series({ ...of_b.get(name), name: "b" })]];
  });
  fill(curves, charts.length ? charts.map(([chart]) => chart.element) : h("p", { class: "empty card" }, "Their jobs have no metric in common that is still kept."));
  for (const [chart, series] of charts) chart.set(series);
}
