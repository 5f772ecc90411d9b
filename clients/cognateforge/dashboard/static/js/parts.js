// What several pages show: states, progress, rows of jobs, capacities, cards.

import { h, table } from "./dom.js";
import { bytes, number, short, span, time, title, words } from "./format.js";

/** Names of jobs that have a page. */
export const JOB = /^jobs\/[0-9a-f-]{36}$/;

const TONES = {
  RUNNING: "good",
  PREPARING: "good",
  VALIDATING: "good",
  SUCCEEDED: "good",
  READY: "good",
  SERVING: "good",
  PUBLISHED: "good",
  PRODUCTION: "good",
  ACTIVE: "good",
  FAILED: "bad",
  AWAY: "bad",
  NOT_SERVING: "bad",
  critical: "bad",
  RECOVERING: "warn",
  EXPERIMENTAL: "warn",
  CANCELLING: "warn",
  PAUSING: "warn",
  PAUSED: "warn",
  warning: "warn",
  OPEN: "bad",
  HALF_OPEN: "warn",
  CLOSED: "good",
};

export function badge(word, note = "") {
  return h("span", { class: `badge ${TONES[word] ?? "plain"}` }, title(word), note ? ` ${note}` : "");
}

export const SERVICE = { cognate: "Cognate", agent: "Agents" };

export function jobBadge(job) {
  const seen = job.observed || !["PREPARING", "RUNNING", "VALIDATING"].includes(job.state);
  return badge(job.state, seen ? "" : "(out of sight)");
}

export function progress(step, total, label) {
  return h("progress", { max: Math.max(total, 1), value: Math.min(step, total), "aria-label": `${label}: ${number(step)} of ${number(total)} steps` });
}

export function jobLink(service, id, text = id.slice(0, 8)) {
  return h("a", { href: `/jobs/${service}/${id}`, class: "mono", "aria-label": `Job ${id}` }, text);
}

/** service: the one that published it. */
export function artifactLink(service, name) {
  return h("a", { href: `/${service === "cognate" ? "models" : "agents"}/${encodeURIComponent(name)}` }, name);
}

/** Jobs as a table. both: whether rows of both services stand in it. */
export function jobTable(caption, rows, { both = true, empty } = {}) {
  const columns = ["Job", ...(both ? ["Service"] : []), "Makes", "State", ["Steps", "wide"], "Submitted", "Outcome"];
  return table(
    caption,
    columns,
    rows.map((job) => [
      jobLink(job.service, job.id),
      ...(both ? [SERVICE[job.service]] : []),
      job.makes,
      jobBadge(job),
      h("span", { class: "steps" }, progress(job.step, job.total_steps, `Job ${job.id.slice(0, 8)}`), h("span", { class: "muted" }, `${number(job.step)} / ${number(job.total_steps)}`)),
      time(job.create_time),
      outcome(job),
    ]),
    empty,
  );
}

function outcome(job) {
  if (job.artifact) return artifactLink(job.service, job.artifact);
  if (job.failure) return h("span", { class: "clip", title: job.failure.message }, job.failure.reason);
  if (job.wait) return h("span", { class: "clip muted", title: job.wait.message }, `waits: ${words(job.wait.reason).toLowerCase()}${job.wait.queue_position ? `, place ${job.wait.queue_position}` : ""}`);
  return "";
}

const KINDS = { CPU: "Processor cores", MEMORY: "Memory", GPU: "Graphics processors" };

export function capacity(one) {
  const tell = one.kind === "MEMORY" ? bytes : number;
  const rest = Math.max(0, one.total - one.held - one.lent);
  const label = `${KINDS[one.kind] ?? one.kind}: ${tell(one.held)} held by Cognate's jobs, ${tell(one.lent)} lent, ${tell(one.total)} in all`;
  const part = (kind, amount) => {
    const bar = h("span", { class: `part ${kind}` });
    bar.style.flexGrow = String(amount / Math.max(one.total, 1));
    return bar;
  };
  return h(
    "div",
    { class: "capacity" },
    h("p", {}, h("span", {}, KINDS[one.kind] ?? one.kind), h("span", { class: "muted" }, `${tell(one.held)} held · ${tell(one.lent)} lent · ${tell(one.total)} in all`)),
    h("div", { class: "meter", role: "img", "aria-label": label }, part("held", one.held), part("lent", one.lent), part("rest", rest)),
  );
}

export function digest(text) {
  return text ? h("code", { title: text }, short(text)) : "";
}

export function ago(moment) {
  return h("span", {}, time(moment), ` (${span(Date.now() / 1000 - moment)})`);
}

/** Markdown of a card as elements: headings, lists, tables, paragraphs, code. What is none of these is text. */
export function card(markdown) {
  const lines = markdown.replace(/^---\n[\s\S]*?\n---\n/, "").split("\n");
  const out = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    const take = (pattern) => {
      const from = at;
      while (at < lines.length && pattern.test(lines[at])) at += 1;
      return lines.slice(from, at);
    };
    if (!line.trim()) at += 1;
    else if (heading) {
      // The page's own headings stand above those of a card.
      out.push(h(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2])));
      at += 1;
    } else if (line.startsWith("```")) {
      at += 1;
      const code = take(/^(?!```)/);
      at += 1;
      out.push(h("pre", { tabindex: "0" }, code.join("\n")));
    } else if (/^\s*\|/.test(line)) {
      const rows = take(/^\s*\|/).map((row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim()));
      const body = rows.slice(1).filter((row) => !row.every((cell) => /^:?-+:?$/.test(cell)));
      out.push(table(`Table of the card: ${rows[0].join(", ")}`, rows[0].map((cell) => cell || "·"), body.map((row) => row.map(inline))));
    } else if (/^\s*[-*]\s/.test(line)) {
      out.push(h("ul", {}, take(/^\s*([-*]\s|\s{2,}\S)/).reduce((items, item) => {
        if (/^\s*[-*]\s/.test(item)) items.push(item.replace(/^\s*[-*]\s/, ""));
        else items[items.length - 1] += ` ${item.trim()}`;
        return items;
      }, []).map((item) => h("li", {}, inline(item)))));
    } else {
      at += 1; // whatever it is, it is text, and the next line is another's turn
      out.push(h("p", {}, inline([line, ...take(/^(?!\s*$|#|```|\s*\||\s*[-*]\s)/)].join(" "))));
    }
  }
  return h("div", { class: "prose" }, out);
}

function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part) => {
    if (part.startsWith("`") && part.length > 1) return h("code", {}, part.slice(1, -1));
    if (part.startsWith("**")) return h("b", {}, part.slice(2, -2));
    return part;
  });
}

const LINK = { model: "models", agent: "agents" };
const KIND = { model: "Model", agent: "Agent", data: "Data", job: "Job" };

/** A chain from a version down to its data, and what was made of it. */
export function lineage(node) {
  const made = node.made?.length
    ? h("div", {}, h("h3", {}, "Made of it"), h("ul", { class: "chain" }, node.made.map((one) => step(one))))
    : null;
  return h("div", {}, h("ul", { class: "chain" }, step(node)), made);
}

function step(node) {
  const link = node.error || node.kind === "data" ? node.name : node.kind === "job" ? node.name.slice(0, 13) : h("a", { href: `/${LINK[node.kind]}/${encodeURIComponent(node.name)}` }, node.name);
  const job = JOB.test(node.job ?? "") ? jobLink(node.kind === "model" ? "cognate" : "agent", node.job.slice(5), `job ${node.job.slice(5, 13)}`) : null;
  return h(
    "li",
    {},
    h("span", { class: "badge plain" }, KIND[node.kind] ?? node.kind),
    " ",
    h("b", {}, link),
    " ",
    digest(node.digest),
    job ? [" · made by ", job] : null,
    h("span", { class: "muted" }, node.error ? ` · cannot be told: ${node.error.message}` : node.detail ? ` · ${node.detail}` : ""),
    node.made_of?.length ? h("ul", {}, node.made_of.map((one) => step(one))) : null,
  );
}

/** Buttons to older and newer pages of a list, by its tokens. */
export function pager(tokens, next, turn) {
  return h(
    "nav",
    { class: "pager", "aria-label": "Pages of the list" },
    h("button", { type: "button", disabled: tokens.length < 2, onclick: () => turn(tokens.slice(0, -1)) }, "Newer"),
    h("span", { class: "muted" }, `Page ${tokens.length}`),
    h("button", { type: "button", disabled: !next, onclick: () => turn([...tokens, next]) }, "Older"),
  );
}
