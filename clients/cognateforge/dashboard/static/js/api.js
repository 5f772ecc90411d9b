// How the page asks its server.

export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.reason = error.reason;
    this.violations = error.violations ?? [];
  }
}

async function answer(response) {
  const body = await response.json().catch(() => ({ error: { message: `HTTP ${response.status}`, reason: "" } }));
  if (!response.ok) throw new Refused(response.status, body.error ?? { message: `HTTP ${response.status}` });
  return body;
}

export async function get(path, signal) {
  return answer(await fetch(path, { signal, headers: { accept: "application/json" } }));
}

const RETRY_MS = 3_000;

let session = null;

/** What this dashboard may do: { version, actions, token }. */
export function about() {
  session ??= get("/api/session");
  return session;
}

/** A UUID. crypto.randomUUID is kept from pages that are not on this machine, so it is made here. */
function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** A wish: sent again after a break, it changes nothing twice. */
export function wish(path) {
  const body = JSON.stringify({ request_id: uuid() });
  return async () => {
    const { token } = await about();
    const headers = { "content-type": "application/json", "x-forge-token": token };
    return answer(await fetch(path, { method: "POST", headers, body }));
  };
}

/**
 * Follow a stream until the signal ends it. url: a function, asked at every start, that tells where to go on.
 * A page that nobody sees holds no connection: browsers have six of them for all its tabs.
 */
export function follow(url, handlers, { signal, onState = () => {} }) {
  let source = null;
  let again = null;
  let over = false;
  const stop = () => {
    clearTimeout(again);
    source?.close();
    source = null;
  };
  const start = () => {
    if (over || source || document.hidden) return;
    source = new EventSource(url());
    source.onopen = () => onState("live");
    source.onerror = () => {
      onState("lost");
      // A browser goes on by itself after a break, and not after a refusal, for instance where too many streams are open.
      if (source?.readyState !== EventSource.CLOSED) return;
      stop();
      again = setTimeout(start, RETRY_MS);
    };
    for (const [kind, handler] of Object.entries(handlers)) {
      source.addEventListener(kind, (event) => handler(JSON.parse(event.data), end));
    }
  };
  const onVisibility = () => (document.hidden ? stop() : start());
  const end = () => {
    over = true;
    stop();
    document.removeEventListener("visibilitychange", onVisibility);
  };
  document.addEventListener("visibilitychange", onVisibility);
  signal.addEventListener("abort", end);
  start();
  return end;
}
