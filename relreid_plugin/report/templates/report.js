"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement, STEP = 40;
  const make = (name, kind, text) => { const node = document.createElement(name); if (kind) node.className = kind; if (text !== undefined) node.textContent = text; return node; };
  const percent = (value) => value === null || value === undefined ? "–" : (100 * value).toFixed(1);
  const source = (number) => "data:image/jpeg;base64," + data.pictures[number];

  const theme = document.getElementById("theme");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const tell = () => { theme.setAttribute("aria-pressed", String(isDark())); theme.textContent = isDark() ? "light" : "dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tell(); });
  tell();

  const dialog = document.getElementById("enlarged");
  function enlarge(number, text, views) {
    const place = dialog.querySelector(".pictures");
    place.replaceChildren();
    if (number >= 0) (views ? views.names : [""]).forEach((name, index, names) => {
      const figure = make("figure"), image = make("img");
      image.alt = views ? name : text;
      image.src = source(number);
      if (views) {
        const part = names.length > 1 ? 100 * index / (names.length - 1) + "%" : "50%";
        image.className = "part";
        image.style.objectPosition = views.stacked ? "50% " + part : part + " 50%";
        image.addEventListener("load", () => {
          const width = image.naturalWidth / (views.stacked ? 1 : names.length), height = image.naturalHeight / (views.stacked ? names.length : 1);
          image.style.aspectRatio = width + " / " + height;
        });
      }
      figure.append(image);
      if (views) figure.append(make("figcaption", "", name));
      place.append(figure);
    });
    dialog.querySelector("p").textContent = text;
    dialog.showModal();
  }
  function picture(number, label, kind, lines, views) {
    const button = make("button", "item " + kind + (views && views.stacked ? " stacked" : ""));
    button.type = "button";
    button.setAttribute("aria-label", label);
    if (number >= 0) { const image = make("img"); image.alt = ""; image.loading = "lazy"; image.src = source(number); button.append(image); }
    else button.append(make("span", "blank"));
    for (const line of lines) button.append(make("span", "", line), make("br"));
    button.addEventListener("click", () => enlarge(number, label, views));
    return button;
  }

  const sections = [...document.querySelectorAll(".view")], tabs = [...document.querySelectorAll("[role=tab]")];
  const state = { view: 0, q: "" };
  const hash = () => new URLSearchParams(location.hash.slice(1));
  const FIELDS = ["id", "cam", "low", "high", "before", "after", "only"];
  let quiet = false;
  function remember() {
    if (quiet) return;
    const out = new URLSearchParams();
    if (state.view) out.set("view", state.view);
    const form = sections[state.view].querySelector(".filters");
    if (form) for (const name of FIELDS) {
      const field = form.elements[name];
      const plain = name === "before" ? "0" : name === "after" ? field.dataset.plain : "";
      if (field.value !== plain) out.set(name, field.value);
    }
    if (state.q !== "") out.set("q", state.q);
    history.replaceState(null, "", "#" + out);
  }
  function show(number, focus) {
    state.view = number;
    sections.forEach((section, index) => { section.hidden = index !== number; });
    tabs.forEach((tab, index) => { tab.setAttribute("aria-selected", String(index === number)); tab.tabIndex = index === number ? 0 : -1; });
    if (focus && tabs[number]) tabs[number].focus();
  }
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => { state.q = ""; show(index); remember(); });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const goal = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : step ? (index + step + tabs.length) % tabs.length : -1;
      if (goal < 0) return;
      event.preventDefault(); state.q = ""; show(goal, true); remember();
    });
  });

  const STATES = [["miss", "another identity"], ["hit", "hit"], ["junk", "discarded"]];
  function strip(view, way, query) {
    const block = make("div"), about = view.ways[way];
    const line = make("h4", "", about.name + " (" + about.protocol + "): AP " + percent(view.ap[way][query]) + (view.rank[way][query] ? ", first match at rank " + view.rank[way][query] : ""));
    const row = make("div", "strip");
    let rank = 0;
    view.index[way][query].forEach((item, place) => {
      if (item < 0) return;
      const [kind, word] = STATES[view.state[way][query][place]];
      if (kind !== "junk") rank += 1;
      const distance = view.distance[way][query][place], number = kind === "junk" ? word : "rank " + rank;
      const label = number + (kind === "junk" ? "" : ", " + word) + ": identity " + view.gpid[item] + ", camera " + view.gcam[item] + ", distance " + distance + ", " + view.gpath[item];
      row.append(picture(view.gthumb[item], label, kind, [{ hit: "✓ ", miss: "✗ ", junk: "∅ " }[kind] + view.gpid[item] + " · c" + view.gcam[item], String(distance)], view.views));
    });
    block.append(line, row);
    return block;
  }

  function looked(view, look, query) {
    const block = make("details", "looked");
    block.open = true;
    block.append(make("summary", "", "whom it looked at (" + look.title + "), by layer; the number below an image is its weight"));
    look.layers.forEach((layer, depth) => {
      const row = make("div", "strip small");
      row.append(make("b", "", "layer " + (depth + 1)));
      layer.index[query].forEach((item, place) => {
        const weight = layer.weight[query][place].toFixed(3);
        if (item < 0) { row.append(picture(view.thumb[query], "layer " + (depth + 1) + ": itself, weight " + weight, "own", ["itself", weight], view.views)); return; }
        const same = view.gpid[item] === view.pid[query];
        const label = "layer " + (depth + 1) + ", " + (same ? "same" : "another") + " identity: " + view.gpid[item] + ", camera " + view.gcam[item] + ", weight " + weight + ", " + view.gpath[item];
        row.append(picture(view.gthumb[item], label, same ? "hit" : "miss", [(same ? "✓ " : "✗ ") + view.gpid[item] + " · c" + view.gcam[item], weight], view.views));
      });
      block.append(row);
    });
    return block;
  }

  const COLOURS = ["#0f7fc9", "#d9661f", "#12966b", "#b65fa0", "#8a6d1d", "#5f6fd0", "#c2410c", "#0e7490", "#65a30d", "#9333ea", "#be185d", "#64748b"];
  const SPACE = (() => { const block = make("div"); block.innerHTML = "<svg></svg>"; return block.firstChild.namespaceURI; })();
  const drawn = (name, values) => { const node = document.createElementNS(SPACE, name); for (const [key, value] of Object.entries(values)) node.setAttribute(key, value); return node; };
  function plane(view, map, figure) {
    const SIZE = 420, EDGE = 14, images = [...map.query.map((item) => ["", item]), ...map.gallery.map((item) => ["g", item])];
    const names = [...new Set(images.map(([side, item]) => view[side + "pid"][item]))];
    const svg = drawn("svg", { viewBox: "0 0 " + SIZE + " " + SIZE, role: "img", tabindex: "0", "aria-label": map.title + ": " + images.length + " images of " + names.length + " identities on a plane by t-SNE" });
    const told = make("p", "told"), image = make("img"), text = make("span");
    told.setAttribute("aria-live", "polite");
    image.alt = "";
    image.hidden = true;
    told.append(image, text);
    text.textContent = names.length + " identities";
    let chosen = -1;
    const points = images.map(([side, item], place) => {
      const x = EDGE + map.x[place] * (SIZE - 2 * EDGE), y = EDGE + map.y[place] * (SIZE - 2 * EDGE), colour = names.indexOf(view[side + "pid"][item]) % COLOURS.length;
      const point = side ? drawn("circle", { cx: x, cy: y, r: 4.5 }) : drawn("path", { d: "M" + x + " " + (y - 7) + "l7 7l-7 7l-7 -7z" });
      point.setAttribute("fill", COLOURS[colour]);
      point.addEventListener("mouseenter", () => pick(place));
      svg.append(point);
      return point;
    });
    function pick(place) {
      if (chosen >= 0) points[chosen].classList.remove("chosen");
      chosen = (place + images.length) % images.length;
      points[chosen].classList.add("chosen");
      const [side, item] = images[chosen], number = view[side + "thumb"][item];
      image.hidden = number < 0;
      if (number >= 0) image.src = source(number);
      text.textContent = (side ? "gallery" : "query") + ": identity " + view[side + "pid"][item] + ", camera " + view[side + "cam"][item] + ", " + view[side + "path"][item].split("/").pop();
    }
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      pick(chosen < 0 ? 0 : chosen + step);
    });
    figure.append(svg, told);
  }

  function beside(view, overlay, row) {
    overlay.query.forEach((query, place) => {
      const pair = make("div", "pair"), about = "identity " + view.pid[query] + ", " + view.path[query];
      pair.append(picture(view.thumb[query], "query: " + about, "own", [String(view.pid[query])]), picture(overlay.thumb[place], overlay.title + ": " + about, "own", ["AP " + percent(view.ap[0][query])]));
      row.append(pair);
    });
  }

  sections.forEach((section, number) => {
    const view = data.views[number], form = section.querySelector(".filters");
    if (!form || !view.order) return;
    section.querySelectorAll(".overlays").forEach((row, index) => beside(view, view.overlays[index], row));
    section.querySelectorAll(".map").forEach((figure, index) => plane(view, view.maps[index], figure));
    const fields = form.elements, list = section.querySelector(".queries"), more = section.querySelector(".more"), count = section.querySelector(".count");
    const alike = view.ways.map((way, index) => index).filter((index) => index && !view.ways[index].aside && view.ways[index].protocol === view.ways[0].protocol);
    const whole = view.ways.map((way, index) => index).filter((index) => !view.ways[index].aside);
    const last = alike.length ? alike[alike.length - 1] : whole[whole.length - 1];
    for (const name of ["before", "after"]) view.ways.forEach((way, index) => {
      const option = make("option", "", way.name + " (" + way.protocol + ")");
      option.value = index;
      fields[name].append(option);
      if (name === "after" && index === last) option.defaultSelected = true;
    });
    fields.after.dataset.plain = String(last);
    fields.after.value = String(last);
    let chosen = [], shown = 0;
    function entry(query) {
      const before = Number(fields.before.value), after = Number(fields.after.value);
      const item = make("li"), head = make("button", "head"), lists = make("div", "lists");
      item.id = "v" + number + "q" + query;
      head.type = "button";
      if (view.thumb[query] >= 0) { const image = make("img"); image.alt = ""; image.loading = "lazy"; image.src = source(view.thumb[query]); head.append(image); }
      const first = view.ap[before][query], second = view.ap[after][query];
      head.append(make("span", "", "identity " + view.pid[query]), make("span", "", "camera " + view.cam[query]), make("span", "", view.matches[query] + " matches"), make("span", "", "AP " + percent(first)));
      if (before !== after) head.append(make("span", second > first ? "won" : second < first ? "lost" : "", "→ " + percent(second)));
      lists.hidden = true;
      const set = (open) => {
        head.setAttribute("aria-expanded", String(open));
        if (open && !lists.childNodes.length) {
          const own = make("div", "strip");
          own.append(picture(view.thumb[query], "query: identity " + view.pid[query] + ", camera " + view.cam[query] + ", " + view.path[query], "own", ["query"], view.views));
          for (const overlay of view.overlays) {
            const place = overlay.query.indexOf(query);
            if (place >= 0) own.append(picture(overlay.thumb[place], overlay.title + ": " + overlay.about + "; identity " + view.pid[query] + ", " + view.path[query], "own", [overlay.title]));
          }
          lists.append(own, strip(view, before, query));
          if (after !== before) lists.append(strip(view, after, query));
          for (const look of view.looks) lists.append(looked(view, look, query));
        }
        lists.hidden = !open;
      };
      head.addEventListener("click", () => { const open = lists.hidden; set(open); state.q = open ? String(query) : ""; remember(); });
      set(false);
      item.append(head, lists);
      item.open = () => set(true);
      return item;
    }
    function extend() {
      for (const query of chosen.slice(shown, shown + STEP)) list.append(entry(query));
      shown = Math.min(chosen.length, shown + STEP);
      more.hidden = shown >= chosen.length;
    }
    section.refresh = () => {
      const before = Number(fields.before.value), after = Number(fields.after.value);
      const low = fields.low.value === "" ? -1 : Number(fields.low.value), high = fields.high.value === "" ? 101 : Number(fields.high.value);
      const key = (query) => view.ap[before][query] === null ? 2 : view.ap[before][query];
      const change = (query) => Math.abs(view.ap[after][query] - view.ap[before][query]);
      chosen = view.order.filter((query) => {
        const first = view.ap[before][query], second = view.ap[after][query], value = first === null ? null : 100 * first;
        if (fields.id.value && String(view.pid[query]) !== fields.id.value.trim()) return false;
        if (fields.cam.value && String(view.cam[query]) !== fields.cam.value.trim()) return false;
        if ((fields.low.value !== "" || fields.high.value !== "") && (value === null || value < low || value > high)) return false;
        if (fields.only.value === "won" && !(second > first)) return false;
        if (fields.only.value === "lost" && !(second < first)) return false;
        return true;
      }).sort((a, b) => fields.only.value ? change(b) - change(a) : key(a) - key(b));
      const pairs = view.order.filter((query) => view.ap[before][query] !== null);
      const won = pairs.filter((query) => view.ap[after][query] > view.ap[before][query]).length, lost = pairs.filter((query) => view.ap[after][query] < view.ap[before][query]).length;
      count.textContent = chosen.length + " of " + view.order.length + " queries" + (before === after ? "" : "; won by the change: " + won + ", lost: " + lost);
      list.replaceChildren();
      shown = 0;
      extend();
    };
    section.openQuery = (query) => {
      const place = chosen.indexOf(query);
      if (place < 0) return;
      while (shown <= place) extend();
      const item = document.getElementById("v" + number + "q" + query);
      item.open();
      item.scrollIntoView();
    };
    more.addEventListener("click", extend);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => { state.q = ""; section.refresh(); remember(); });
    form.addEventListener("reset", () => setTimeout(() => { state.q = ""; section.refresh(); remember(); }));
    section.refresh();
  });

  function follow() {
    quiet = true;
    const wanted = hash(), number = Number(wanted.get("view") || 0);
    if (sections[number]) show(number);
    const section = sections[state.view], form = section && section.querySelector(".filters");
    if (form && section.refresh) {
      for (const name of FIELDS) if (wanted.has(name)) form.elements[name].value = wanted.get(name);
      section.refresh();
      state.q = wanted.get("q") || "";
      if (state.q !== "") section.openQuery(Number(state.q));
    }
    quiet = false;
  }
  addEventListener("hashchange", follow);
  if (location.hash.length > 1 && location.hash !== "#main") follow();
})();
