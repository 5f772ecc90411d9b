// Jobs of a service, newest first, by state.

import { get } from "../api.js";
import { fill, h } from "../dom.js";
import { title } from "../format.js";
import { jobTable, pager, SERVICE } from "../parts.js";

const GROUPS = {
  "": [],
  active: ["PREPARING", "RUNNING", "VALIDATING", "RECOVERING", "PAUSING", "CANCELLING"],
};
const STATES = ["QUEUED", "PREPARING", "RUNNING", "VALIDATING", "RECOVERING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED"];

export async function render({ main, query, signal, go, onBoard }) {
  const service = query.get("service") === "agent" ? "agent" : "cognate";
  const state = query.get("state") ?? "";
  const list = h("div", { class: "card" });
  const choose = (name, value) => {
    const next = new URLSearchParams({ service, state });
    next.set(name, value);
    go(`/jobs?${next}`);
  };
  const select = (label, name, value, options) =>
    h("label", { class: "field" }, label, h("select", { onchange: (event) => choose(name, event.target.value) }, options.map(([key, text]) => h("option", { value: key, selected: key === value }, text))));
  fill(
    main,
    h("h1", {}, "Jobs"),
    h(
      "div",
      { class: "tools" },
      select("Service", "service", service, Object.entries(SERVICE)),
      select("State", "state", state, [["", "All"], ["active", "With a worker"], ...STATES.map((word) => [word, title(word)])]),
    ),
    list,
  );

  let tokens = [""];
  let drawn = "";
  const load = async () => {
    const asked = new URLSearchParams({ service, token: tokens.at(-1) });
    for (const word of GROUPS[state] ?? [state]) asked.append("state", word);
    const page = await get(`/api/jobs?${asked}`, signal);
    // A row that is drawn anew is gone from under a finger: only news is worth that.
    const now = JSON.stringify(page);
    if (now === drawn) return;
    drawn = now;
    const turn = async (next) => {
      tokens = next;
      await load();
      list.querySelector("a")?.focus();
    };
    fill(list, jobTable(`Jobs of ${SERVICE[service]}`, page.items, { both: false, empty: "No such job." }), page.next_page_token || tokens.length > 1 ? pager(tokens, page.next_page_token, turn) : null);
  };
  await load();
  // The newest page goes with the board; an older one is left as it is, so that nothing moves under the reader.
  let loading = false;
  onBoard(async () => {
    if (tokens.length > 1 || loading || list.contains(document.activeElement)) return;
    loading = true;
    await load().catch(() => {}); // away: the notice tells it
    loading = false;
  }, signal);
}
