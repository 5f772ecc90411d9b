// One published version: what was measured, its card, where it comes from.

import { get } from "../api.js";
import { facts, fill, h, section, table } from "../dom.js";
import { bytes, number, time, title, words } from "../format.js";
import { badge, card, digest, JOB, jobLink, lineage } from "../parts.js";

export async function render({ main, parameters, signal, setTitle }) {
  const { kind, name } = parameters;
  const { item, card: text, lineage: chain } = await get(`/api/${kind}/${encodeURIComponent(name)}`, signal);
  setTitle(item.name);
  const models = kind === "models";
  const job = JOB.test(item.job) ? jobLink(models ? "cognate" : "agent", item.job.slice(5)) : item.job;
  const results = models ? item.results : item.evaluations;
  fill(
    main,
    h("p", { class: "crumbs" }, h("a", { href: `/${kind}` }, title(kind))),
    h("div", { class: "title" }, h("h1", {}, item.name), badge(models ? item.state : item.lifecycle)),
    item.storage?.damage ? h("p", { class: "notice bad" }, `Its stored bytes are damaged: ${item.storage.damage}`) : null,
    facts([
      ["Published", time(item.create_time)],
      ["Job", job],
      ["Digest", digest(item.digest)],
      ["Size", bytes(item.size_bytes)],
      ["Steps", models ? number(item.steps) : ""],
      ["Tokens", models ? number(item.tokens) : ""],
      ["Task", models ? "" : words(item.task)],
      ["Architecture", models ? item.architecture?.name : item.architecture],
      ["Trained parameters", models ? "" : `${number(item.trainable_parameters)} of ${number(item.total_parameters)}`],
      ["Aliases", models ? "" : item.aliases.join(", ")],
      ["Kept", [title(item.storage?.tier ?? ""), item.storage?.pinned ? "pinned" : "", item.storage?.key ? "signed" : "not signed"].filter(Boolean).join(", ")],
    ]),
    h(
      "div",
      { class: "columns" },
      h("div", { class: "stack" },
        section("Results", table("Results", ["Metric", "Set", ["Value", "num"], ["Rows", "num"]], results.map((one) => [words(one.metric), one.dataset, number(one.value), number(one.rows)]), "Nothing was measured.")),
        models ? section("Checks", checks(item.checks)) : null,
        section("Card", text ? card(text) : h("p", { class: "empty" }, "This version has no card.")),
      ),
      h("div", { class: "stack" },
        section("Lineage", lineage(chain), h("p", { class: "muted" }, "What the services say. ", h("code", {}, `forge verify ${item.name}`), " holds signatures against your keys.")),
        section("Files", table("Files", ["Path", ["Size", "num"], "Digest"], item.files.map((file) => [file.path, bytes(file.size_bytes), digest(file.digest)]))),
      ),
    ),
  );
}

function checks(found) {
  return table(
    "Checks",
    ["Check", "Kind", "Holds", ["Value", "num"], ["Bound", "num"]],
    found.map((one) => [h("span", { title: one.detail }, words(one.name)), one.integrity ? "integrity" : "quality", one.passed ? h("span", { class: "badge good" }, "yes") : h("span", { class: "badge bad" }, "no"), one.value === undefined ? "" : number(one.value), one.threshold === undefined ? "" : number(one.threshold)]),
    "No check was made.",
  );
}
