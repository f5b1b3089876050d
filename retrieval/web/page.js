// The page of `retrieve serve`. Every text from outside goes through textContent, so that no name becomes markup.
"use strict";

const kept = {
  get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
  set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* private windows keep nothing */ } },
};
const THEMES = { system: "Auto", light: "Light", dark: "Dark" };

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
setTheme(kept.get("regraft-theme") || "system"); // before anything is painted

document.addEventListener("DOMContentLoaded", () => {
  const $ = (id) => document.getElementById(id);
  const number = (n) => n.toLocaleString("en");
  const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;
  const SAME = "the same file";
  const K = 24, PAGE = 36, PATIENCE = 150; // milliseconds before ghosts show that something goes on

  let about = { max_upload: 25e6, max_pictures: 16 };
  let shown = []; // the images in the grid, in order
  let open = -1; // which of them the detail view shows
  let turn = 0; // answers to older questions are dropped
  let under = null; // what is being asked
  const uploads = new Map(); // number → files, so that "back" finds them again
  let retry = null;

  // ------------------------------------------------------------------------------------------------------ small things

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function split(path) {
    const at = path.lastIndexOf("/");
    return [path.slice(at + 1), path.slice(0, at + 1)];
  }

  async function call(path, options) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is “retrieve serve” still running?");
    }
    const body = await answer.json().catch(() => null);
    if (!answer.ok) throw new Error((body && body.detail) || `The server answered with ${answer.status}.`);
    return body;
  }

  function say(title, text, act, action, bad) {
    $("message").hidden = false;
    $("message").classList.toggle("bad", Boolean(bad));
    $("message-title").textContent = title;
    $("message-text").textContent = text;
    $("message-act").hidden = !act;
    $("message-act").textContent = act || "";
    retry = action || null;
  }
  $("message-act").addEventListener("click", () => retry && retry());

  function fail(error, again) {
    shown = [];
    $("grid").replaceChildren();
    $("more").hidden = true;
    $("heading").textContent = $("status").textContent = "";
    say("That did not work", error.message, again ? "Try again" : "Choose another picture", again || choose, true);
  }

  // -------------------------------------------------------------------------------------------------------------- grid

  function tile(image, i) {
    const item = make("li", "tile");
    const [name, folder] = split(image.path);
    const pick = make("button", "pick");
    pick.type = "button";
    pick.tabIndex = i ? -1 : 0;
    pick.dataset.i = i;
    pick.title = image.path;
    const score = image.score === undefined ? "" : `, score ${image.score.toFixed(3)}`;
    const words = marks(image);
    pick.setAttribute("aria-label", `${[image.path + score, ...words].join(", ")}: search with it`);
    const frame = make("span", "frame");
    frame.append(picture(`thumbs/${image.id}`));
    if (words.length) {
      const row = make("span", "marks");
      row.append(...words.map((word) => make("i", word === SAME ? "mark" : "mark bad", word)));
      frame.append(row);
    }
    const caption = make("span", "caption");
    caption.append(make("b", "", name));
    if (score) {
      caption.append(make("span", "score", image.score.toFixed(3)));
      const bar = make("span", "bar"), fill = make("i");
      fill.style.width = `${Math.max(0, image.score) * 100}%`;
      bar.append(fill);
      caption.append(bar);
    }
    caption.append(make("small", "", folder + (image.also.length ? ` (+${image.also.length} the same)` : "")));
    pick.append(frame, caption);
    const look = make("button", "look");
    look.type = "button";
    look.tabIndex = -1;
    look.setAttribute("aria-label", `Details of ${image.path}`);
    look.title = "Details";
    look.innerHTML = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M14 4h6v6M20 4l-7 7M10 20H4v-6M4 20l7-7"/></svg>';
    item.append(pick, look);
    return item;
  }

  /** What to know of an image's file, or of one of its paths, in words. */
  function marks(image, path = image.path) {
    const words = image.same ? [SAME] : [];
    if ((image.missing_paths || []).includes(path)) words.push("missing");
    if ((image.changed_paths || []).includes(path)) words.push("changed since");
    return words;
  }

  function picture(address, instead = "cannot be shown any more") {
    const image = make("img");
    image.alt = "";
    image.loading = "lazy";
    image.decoding = "async";
    image.draggable = false;
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 64 && image.naturalHeight <= 64));
    image.addEventListener("error", () => image.replaceWith(make("span", "lost", instead)));
    image.src = address;
    return image;
  }

  function fill(images, append) {
    const from = append ? shown.length : 0;
    shown = append ? shown.concat(images) : images;
    const tiles = images.map((image, i) => tile(image, from + i));
    append ? $("grid").append(...tiles) : $("grid").replaceChildren(...tiles);
    $("grid").classList.remove("busy");
  }

  function ghosts() {
    $("grid").replaceChildren(...Array.from({ length: 12 }, () => {
      const item = make("li", "tile ghost");
      item.append(make("span", "frame"), make("span", "caption"));
      return item;
    }));
  }

  const picks = () => [...$("grid").querySelectorAll(".tile:not([hidden]) .pick")];

  function focusPick(pick) {
    $("grid").querySelectorAll('.pick[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    pick.tabIndex = 0;
    pick.focus();
    pick.scrollIntoView({ block: "nearest" });
  }

  function moved(all, at, key) {
    const top = all[at].offsetParent.offsetTop;
    const row = all.filter((one) => one.offsetParent.offsetTop === all[0].offsetParent.offsetTop).length;
    if (key === "ArrowLeft") return Math.max(0, at - 1);
    if (key === "ArrowRight") return Math.min(all.length - 1, at + 1);
    if (key === "ArrowUp") return at - row >= 0 ? at - row : at;
    if (key === "ArrowDown") return at + row < all.length ? at + row : (all.at(-1).offsetParent.offsetTop > top ? all.length - 1 : at);
    if (key === "Home") return 0;
    if (key === "End") return all.length - 1;
    return -1;
  }

  $("grid").addEventListener("keydown", (event) => {
    const pick = event.target.closest(".pick");
    if (!pick || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") {
      event.preventDefault();
      detail(Number(pick.dataset.i));
      return;
    }
    const all = picks(), to = moved(all, all.indexOf(pick), event.key);
    if (to < 0) return;
    event.preventDefault();
    focusPick(all[to]);
  });

  $("grid").addEventListener("click", (event) => {
    const item = event.target.closest(".tile");
    const pick = item && item.querySelector(".pick");
    if (!pick) return;
    if (event.target.closest(".look")) detail(Number(pick.dataset.i));
    else if (event.target.closest(".pick")) search({ id: shown[Number(pick.dataset.i)].id });
  });

  // ------------------------------------------------------------------------------------------------------ what is asked

  /** Start over with a way of asking, `{}`, `{id}` or `{upload}`: kept in the history. */
  function search(state) {
    const now = { ...state, k: Number($("k").value) };
    history.pushState(now, "", address(now));
    return show(now, $("grid").contains(document.activeElement) || $("detail").open);
  }

  function address(state) {
    const query = new URLSearchParams();
    if (state.id !== undefined) query.set("id", state.id);
    if (state.k !== K && state.id !== undefined) query.set("k", state.k);
    return `./${query.size ? `?${query}` : ""}`;
  }

  async function show(state, focus) {
    const mine = ++turn;
    if (under) under.abort();
    under = new AbortController();
    if ($("detail").open) $("detail").close();
    $("message").hidden = true;
    $("more").hidden = true;
    const home = state.id === undefined && state.upload === undefined;
    document.body.dataset.view = home ? "home" : "results";
    $("query").hidden = $("controls").hidden = home;
    $("choose").textContent = home ? "Choose a picture" : "Choose another picture";
    $("k").value = String(state.k || K);
    $("heading").textContent = home ? "Or begin with one of these" : "Most alike";
    $("status").textContent = home ? "Loading …" : "Looking for pictures like it …";
    window.scrollTo({ top: 0 });
    $("grid").classList.add("busy");
    const waiting = setTimeout(() => { if (!shown.length || !$("grid").children.length) ghosts(); }, PATIENCE);
    try {
      await (home ? begin(mine) : find(state, mine));
    } catch (error) {
      if (error.name !== "AbortError" && mine === turn) fail(error, error.final ? null : () => show(state));
    }
    clearTimeout(waiting);
    if (mine !== turn) return;
    $("grid").classList.remove("busy");
    if (focus && picks().length) focusPick(picks()[0]);
  }

  async function begin(mine, offset = 0) {
    const part = await call(`api/images?spread=true&limit=${PAGE}&offset=${offset}`, { signal: under.signal });
    if (mine !== turn) return;
    fill(part.images, offset > 0);
    $("status").textContent = part.total ? `${plural(part.total, "image")} in this gallery` : "";
    if (!part.total) {
      $("heading").textContent = "";
      say("This gallery is empty", "Add pictures with “retrieve add INDEX IMAGES”, and come back.", "Look again", () => show({}));
    }
    $("more").hidden = shown.length >= part.total;
  }
  $("more").addEventListener("click", async () => {
    const first = shown.length, keyboard = document.activeElement === $("more");
    try {
      await begin(turn, first);
      if (keyboard && picks()[first]) focusPick(picks()[first]);
    } catch (error) {
      if (error.name !== "AbortError") $("status").textContent = error.message;
    }
  });

  async function find(state, mine) {
    const k = state.k || K;
    const files = uploads.get(state.upload);
    let answer;
    if (state.id !== undefined) {
      ask([{ address: `thumbs/${state.id}?size=large` }], "", "");
      answer = await call(`api/images/${state.id}/similar?k=${k}`, { signal: under.signal });
    } else if (files) {
      ask(files.map((file) => ({ file })), named(files), "");
      const form = new FormData();
      for (const file of files) form.append("files", file, file.name);
      form.append("k", k);
      answer = await call("api/search", { method: "POST", body: form, signal: under.signal }).catch((error) => {
        error.final = !error.message.startsWith("The server");
        throw error;
      });
    } else {
      ask([], "The picture is gone", "");
      throw Object.assign(new Error("This page does not have the picture any more, since it was loaded anew."), { final: true });
    }
    if (mine !== turn) return;
    const own = answer.query.filter((one) => one.id !== null);
    if (state.id !== undefined) {
      const [name, folder] = split(answer.query[0].name);
      $("asked").textContent = name;
      $("note").textContent = folder;
    } else if (own.length) {
      $("note").textContent = own.length === 1 ? "It is in the gallery itself, and comes first." : `${own.length} of them are in the gallery, and come first.`;
    }
    fill(answer.results);
    shown.took = `among ${plural(answer.images, "image")}, in ${Math.max(1, Math.round(answer.seconds * 1000))} ms`;
    if (!shown.length) {
      $("status").textContent = "";
      say("Nothing found", "The gallery holds no other image.", "Back to the start", () => search({}));
    } else {
      cut();
    }
  }

  function named(files) {
    return files.length === 1 ? files[0].name : `${files.length} pictures together`;
  }

  function ask(pictures, title, note) {
    $("asked").textContent = title;
    $("note").textContent = note;
    for (const old of $("pictures").querySelectorAll("img")) if (old.src.startsWith("blob:")) URL.revokeObjectURL(old.src);
    const nodes = pictures.slice(0, 4).map((one) => {
      const image = picture(one.address || URL.createObjectURL(one.file), "no preview here");
      image.alt = "The picture that is searched with";
      image.loading = "eager";
      return image;
    });
    $("pictures").classList.toggle("several", nodes.length > 1);
    $("pictures").replaceChildren(...nodes);
  }

  // ---------------------------------------------------------------------------------------------------------- controls

  /** Leave out what scores less than the threshold: the best k of at least a score are the best k, cut there. */
  function cut() {
    const least = Number($("threshold").value);
    $("least").textContent = least > 0 ? least.toFixed(2) : "any";
    if (document.body.dataset.view !== "results" || !shown.length) return;
    let count = 0;
    for (const item of $("grid").querySelectorAll(".tile")) {
      const image = shown[Number(item.querySelector(".pick").dataset.i)];
      item.hidden = least > 0 && image.score < least;
      if (!item.hidden) count += 1;
    }
    const first = picks()[0];
    if (first && !$("grid").querySelector('.tile:not([hidden]) .pick[tabindex="0"]')) first.tabIndex = 0;
    $("status").textContent = count ? `${plural(count, "picture")} ${shown.took}` : "";
    $("message").hidden = count > 0;
    if (!count) {
      const best = Math.max(...shown.map((image) => image.score)).toFixed(3);
      say("Nothing found", `No picture scores at least ${least.toFixed(2)}; the best has ${best}.`, "Show all", () => {
        $("threshold").value = 0;
        cut();
      });
    }
  }
  $("threshold").addEventListener("input", cut);
  $("k").addEventListener("change", () => {
    const state = { ...history.state, k: Number($("k").value) };
    history.replaceState(state, "", address(state));
    show(state);
  });

  // ------------------------------------------------------------------------------------------------- giving a picture

  function choose() { $("file").click(); }

  function take(files) {
    if (!files.length) return;
    const total = files.reduce((sum, file) => sum + file.size, 0);
    if (files.length > about.max_pictures) {
      refuse(`${files.length} pictures are too many: at most ${about.max_pictures} are one search.`);
    } else if (total > about.max_upload) {
      refuse(`${named(files)}: ${(total / 1e6).toFixed(1)} MB are too large; at most ${Math.round(about.max_upload / 1e6)} MB can be sent.`);
    } else {
      const next = uploads.size + 1;
      uploads.set(next, files);
      search({ upload: next });
    }
  }

  function refuse(text) {
    if ($("detail").open) $("detail").close();
    say("That did not work", text, "Choose another picture", choose, true);
    $("message").scrollIntoView({ block: "center" });
  }

  $("choose").addEventListener("click", choose);
  $("file").addEventListener("change", () => {
    take([...$("file").files]);
    $("file").value = "";
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) take(files);
    else refuse("The clipboard holds no picture. Copy a picture itself, not its name or address.");
  });
  let inside = 0;
  const carries = (event) => event.dataTransfer && [...event.dataTransfer.types].some((type) => type === "Files" || type === "text/uri-list");
  document.addEventListener("dragenter", (event) => {
    if (!carries(event)) return;
    inside += 1;
    $("veil").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!carries(event)) return;
    inside = Math.max(0, inside - 1);
    $("veil").hidden = inside > 0 ? $("veil").hidden : true;
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    $("veil").hidden = true;
    const files = [...event.dataTransfer.files];
    if (files.length) take(files);
    else if (carries(event)) refuse("That was a link, not a picture. Save the picture first, then drop the file.");
  });

  // ------------------------------------------------------------------------------------------------------------ detail

  async function detail(i) {
    open = i;
    const image = shown[i];
    const [name] = split(image.path);
    $("detail-name").textContent = name;
    $("detail-image").hidden = false;
    $("detail-problem").hidden = true;
    $("detail-image").src = `thumbs/${image.id}?size=large`;
    $("detail-image").alt = image.path;
    $("detail-file").href = `files/${image.id}`;
    $("detail-file").hidden = false;
    facts(image, {});
    $("detail-also").hidden = !image.also.length;
    $("detail-paths").replaceChildren(...image.also.map((path) => make("li", "", noted(image, path))));
    const all = picks().map((pick) => Number(pick.dataset.i)), at = all.indexOf(i);
    $("previous").disabled = at <= 0;
    $("next").disabled = at >= all.length - 1;
    if (!$("detail").open) $("detail").showModal();
    try {
      const more = await call(`api/images/${image.id}`);
      if (open === i && $("detail").open) {
        facts(image, more);
        if (more.problem) cannotShow(more.problem);
      }
    } catch (error) {
      if (open === i) cannotShow(error.message);
    }
  }

  function noted(image, path) {
    const words = marks(image, path).filter((word) => word !== SAME);
    return words.length ? `${path} (${words.join(", ")})` : path;
  }

  function cannotShow(text) {
    $("detail-image").hidden = true;
    $("detail-file").hidden = true;
    $("detail-problem").hidden = false;
    $("detail-problem").textContent = text;
  }

  function facts(image, more) {
    const rows = [["Path", image.path], ["Note", marks(image).join(", ") || null], ["Score", image.score === undefined ? null : image.score.toFixed(4)], ["Id", String(image.id)]];
    if (more.width) rows.push(["Size", `${number(more.width)} × ${number(more.height)} pixels`]);
    if (more.bytes) rows.push(["File", `${more.format}, ${more.bytes < 1e6 ? `${number(Math.ceil(more.bytes / 1e3))} kB` : `${(more.bytes / 1e6).toFixed(1)} MB`}`]);
    $("detail-facts").replaceChildren(...rows.filter(([, text]) => text !== null).flatMap(([key, text]) => [make("dt", "", key), make("dd", "", text)]));
  }

  function step(by) {
    const all = picks().map((pick) => Number(pick.dataset.i)), to = all.indexOf(open) + by;
    if (to >= 0 && to < all.length) detail(all[to]);
  }
  $("detail-image").addEventListener("load", (event) => {
    const { naturalWidth: width, naturalHeight: height, style, classList } = event.target;
    const few = width <= 64 && height <= 64, most = few ? 12 : 3; // times: beyond, a picture is only blurred
    classList.toggle("pixels", few);
    style.maxWidth = `${most * width}px`;
    style.maxHeight = `${most * height}px`;
  });
  $("detail-image").addEventListener("error", () => {
    if ($("detail").open && $("detail-problem").hidden) cannotShow("This picture cannot be shown any more.");
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => $("detail").close());
  $("detail-search").addEventListener("click", () => search({ id: shown[open].id }));
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
  $("detail").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  $("detail").addEventListener("close", () => {
    $("detail-image").removeAttribute("src");
    const pick = picks().find((one) => Number(one.dataset.i) === open);
    if (pick) focusPick(pick);
  });

  // ---------------------------------------------------------------------------------------------------------- the rest

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest && event.target.closest("input:not([type=range]), select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey || typing || $("detail").open) return;
    if (event.key === "/") {
      event.preventDefault();
      $("choose").focus();
    } else if (event.key === "Escape" && document.body.dataset.view === "results") {
      search({});
    } else if (event.key.startsWith("Arrow") && document.activeElement === document.body && picks().length) {
      event.preventDefault();
      focusPick(picks()[0]);
    }
  });
  $("home").addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    search({});
  });
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES), now = kept.get("regraft-theme") || "system";
    paint(names[(names.indexOf(now) + 1) % names.length]);
  });
  function paint(theme) {
    kept.set("regraft-theme", theme);
    setTheme(theme);
    $("theme").textContent = `Theme: ${THEMES[theme]}`;
  }
  paint(kept.get("regraft-theme") in THEMES ? kept.get("regraft-theme") : "system");

  window.addEventListener("popstate", (event) => show(event.state || {}));
  const given = new URLSearchParams(location.search); // the token is a cookie by now, and leaves the address
  const id = given.get("id"), k = Number(given.get("k"));
  let first = history.state || {};
  if (/^\d+$/.test(id || "")) first = { id: Number(id), k: [...$("k").options].some((one) => Number(one.value) === k) ? k : K };
  history.replaceState(first, "", address(first));
  show(first);

  call("api/info").then((found) => {
    about = found;
    $("name").textContent = found.name;
    $("about").textContent = `${plural(found.images, "image")} · ${found.network.split(":")[0]}`;
    $("about").title = `${found.network}; search: ${found.search}`;
    document.title = `${found.name} – search by picture`;
    $("warning").hidden = !found.warnings.length;
    $("warning").textContent = found.warnings.join("\n");
  }).catch(() => { /* the pictures' own request says what is wrong */ });
});
