// Published models or agents, newest first; two of them can be laid side by side.

import { get } from "../api.js";
import { fill, h, table } from "../dom.js";
import { bytes, number, time, title, words } from "../format.js";
import { badge, JOB, jobLink, pager } from "../parts.js";

export async function render({ main, parameters, signal, go }) {
  const { kind } = parameters;
  const models = kind === "models";
  const list = h("div", { class: "card" });
  const chosen = [];
  const compare = h("button", { type: "button", class: "primary", disabled: true, onclick: () => go(`/compare/${kind}?a=${encodeURIComponent(chosen[0])}&b=${encodeURIComponent(chosen[1])}`) }, "Compare the two");
  const hint = h("p", { class: "muted", role: "status" }, "Choose two to compare them.");
  fill(main, h("h1", {}, title(kind)), h("div", { class: "tools" }, hint, compare), list);

  const choose = (event) => {
    const name = event.target.value;
    if (event.target.checked) chosen.push(name);
    else chosen.splice(chosen.indexOf(name), 1);
    compare.disabled = chosen.length !== 2;
    hint.textContent = chosen.length === 2 ? `${chosen[0]} and ${chosen[1]}` : chosen.length > 2 ? "Choose only two." : `Choose ${2 - chosen.length === 2 ? "two" : "one more"} to compare them.`;
  };

  let tokens = [""];
  const load = async () => {
    const page = await get(`/api/${kind}?token=${encodeURIComponent(tokens.at(-1))}`, signal);
    const turn = async (next) => {
      tokens = next;
      await load();
      list.querySelector("a")?.focus();
    };
    const box = (item) => h("input", { type: "checkbox", value: item.name, checked: chosen.includes(item.name), "aria-label": `Compare ${item.name}`, onchange: choose });
    const link = (item) => h("span", { class: "pick" }, box(item), h("a", { href: `/${kind}/${encodeURIComponent(item.name)}` }, item.name));
    const state = (item) => [badge(item.damage ? "FAILED" : item.state), item.damage ? h("span", { class: "clip", title: item.damage }, " damaged") : ""];
    const job = (item) => (JOB.test(item.job) ? jobLink(models ? "cognate" : "agent", item.job.slice(5)) : item.job);
    const rows = page.items.map((item) =>
      models
        ? [link(item), state(item), results(item), number(item.steps), bytes(item.size_bytes), job(item), time(item.create_time)]
        : [link(item), [state(item), item.aliases.map((alias) => [" ", h("span", { class: "badge plain" }, alias)])], words(item.task), item.foundation ? h("a", { href: `/models/${encodeURIComponent(item.foundation)}` }, item.foundation) : "", results(item), job(item), time(item.create_time)],
    );
    const columns = models ? ["Model", "State", "Results", ["Steps", "num"], ["Size", "num"], "Job", "Published"] : ["Agent", "State", "Task", "Foundation", "Results", "Job", "Published"];
    fill(list, table(title(kind), columns, rows, "Nothing was published yet."), page.next_page_token || tokens.length > 1 ? pager(tokens, page.next_page_token, turn) : null);
  };
  await load();
}

const SHOWN = 2;

function results(item) {
  const told = item.results.slice(0, SHOWN).map((one) => h("li", {}, `${words(one.metric)} `, h("b", {}, number(one.value))));
  if (item.results.length > SHOWN) told.push(h("li", { class: "muted" }, `and ${item.results.length - SHOWN} more`));
  return h("ul", { class: "plain" }, told);
}
