// What the host of Cognate has, what of it is lent, and what is reserved.

import { get } from "../api.js";
import { fill, h, section, table } from "../dom.js";
import { number, time } from "../format.js";
import { capacity, pager } from "../parts.js";

export async function render({ main, signal, onBoard }) {
  const meters = h("div", { class: "meters" });
  const jobs = h("p", { class: "muted" });
  const list = h("div");
  const ended = h("input", { type: "checkbox", onchange: () => void load([""]) });
  fill(
    main,
    h("h1", {}, "Resources"),
    section("Capacity and leases", jobs, meters, h("p", { class: "muted" }, "Lent is what the agent service holds by leases. Cognate takes it back when its own jobs need it.")),
    section("Reservations", h("label", { class: "field inline" }, ended, "Also those that are over"), list),
  );
  let tokens = [""];
  const load = async (next) => {
    tokens = next;
    const found = await get(`/api/resources?ended=${ended.checked ? 1 : 0}&token=${encodeURIComponent(tokens.at(-1))}`, signal);
    fill(jobs, `${number(found.running_jobs)} of Cognate's jobs hold a worker, ${number(found.queued_jobs)} wait for one.`);
    fill(meters, found.capacities.map(capacity));
    fill(
      list,
      table(
        "Reservations",
        ["Purpose", ["Slots", "num"], "From", "Until", "By", "State"],
        found.reservations.map((one) => [one.purpose || one.name.slice(13, 21), number(one.slots), time(one.start_time), time(one.end_time), one.caller, one.cancel_time ? "cancelled" : new Date(one.end_time) < new Date() ? "over" : new Date(one.start_time) > new Date() ? "to come" : "now"]),
        "Nothing is reserved.",
      ),
      found.next_page_token || tokens.length > 1 ? pager(tokens, found.next_page_token, load) : null,
    );
  };
  await load([""]);
  let loading = false;
  onBoard(async () => {
    if (loading || list.contains(document.activeElement)) return;
    loading = true;
    await load(tokens).catch(() => {}); // away: the notice tells it
    loading = false;
  }, signal);
}
