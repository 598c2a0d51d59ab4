use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use super::{MergeReport, ModuleMergeReport};

const WIDTH: usize = 960;
const MARGIN: usize = 24;
/// Side of a cell of a map with its gap.
const CELL: usize = 16;
const MATRIX_CELL: (usize, usize) = (46, 26);
const MAP_LABELS: usize = 92;
/// Classes of a share from 0 to 1, and of what is more.
const STEPS: usize = 10;

const STYLE: &str = "
svg{--surface:#fcfcfb;--ink:#1c1b1a;--quiet:#6b6963;--line:#d3d1ca;--c0:#eef3f9;--c1:#dbe7f5;--c2:#c3d8f0;--c3:#a6c5ea;--c4:#85afe2;--c5:#6297d6;--c6:#417ec7;--c7:#2a66b0;--c8:#1a4f93;--c9:#0f3970;--low:#1c1b1a;--high:#ffffff}
@media(prefers-color-scheme:dark){svg{--surface:#1a1a19;--ink:#f0efec;--quiet:#a3a19a;--line:#4a4843;--c0:#222b36;--c1:#23364b;--c2:#264462;--c3:#2b547c;--c4:#326698;--c5:#3f7ab5;--c6:#5893d0;--c7:#7aace2;--c8:#a2c6ef;--c9:#cde1f8;--low:#f0efec;--high:#14130f}}
text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--ink)}
.title{font-size:18px;font-weight:600}.head{font-size:13px;font-weight:600}.quiet{fill:var(--quiet)}.small{font-size:10px}
.surface{fill:var(--surface)}.none{fill:none;stroke:var(--line)}
.c0{fill:var(--c0)}.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}.c5{fill:var(--c5)}.c6{fill:var(--c6)}.c7{fill:var(--c7)}.c8{fill:var(--c8)}.c9{fill:var(--c9)}
.low{fill:var(--low)}.high{fill:var(--high)}.right{text-anchor:end}.middle{text-anchor:middle}";

/// The report as a picture: how far each module is from the exact sum, how much of each adapter is left where, and which
/// directions adapters have in common. An SVG that stands alone and follows the colour scheme of who looks at it; exact
/// figures are in its tooltips.
pub(crate) fn merge_picture(report: &MergeReport) -> String {
    let map = BlockMap::new(&report.modules);
    let summary = &report.summary;
    let mut page = Page { body: String::new(), y: MARGIN + 16 };
    let count = summary.adapters.len();
    let adapters = if count == 1 { "1 adapter".to_string() } else { format!("{count} adapters") };
    page.text(MARGIN, "title", &format!("{adapters}, merged by {} at rank {}", report.recipe.method, summary.rank));
    page.y += 20;
    let mut line = format!("{} modules", summary.modules);
    if let Some(error) = summary.error {
        let _ = write!(line, " · distance from the exact sum {}", percent(error));
    }
    if let Some(error) = summary.weighted_error {
        let _ = write!(line, " · of the outputs {}", percent(error));
    }
    page.text(MARGIN, "quiet", &line);
    page.y += 18;
    page.legend();

    let mut panels = Vec::new();
    let of_module = |value: &dyn Fn(&ModuleMergeReport) -> Option<f64>| -> Vec<(usize, f64, f64)> {
        (report.modules.iter().enumerate())
            .filter_map(|(index, module)| Some((index, value(module)?, module.kept.as_ref()?.sum_norm.powi(2))))
            .collect()
    };
    panels.push(Panel {
        title: "distance from the exact sum".into(),
        note: summary.error.map_or(String::new(), percent),
        cells: map.cells(&of_module(&|module| Some(module.kept.as_ref()?.error))),
    });
    if let Some(error) = summary.weighted_error {
        panels.push(Panel {
            title: "distance of the outputs".into(),
            note: percent(error),
            cells: map.cells(&of_module(&|module| module.kept.as_ref()?.weighted_error)),
        });
    }
    page.section("Distance from the exact weighted sum, by block and Linear");
    page.panels(&map, &panels);
    let names = short_names(summary.adapters.iter().map(|adapter| adapter.path.as_path()));
    let panels: Vec<Panel> = (summary.adapters.iter().zip(&names).enumerate())
        .map(|(index, (adapter, name))| {
            let values: Vec<(usize, f64, f64)> = (report.modules.iter().enumerate())
                .filter_map(|(at, module)| {
                    let place = module.adapters.iter().position(|&source| source == index)?;
                    let share = module.kept.as_ref()?.sources[place];
                    Some((at, share.retained, share.norm.powi(2)))
                })
                .collect();
            let retained = adapter.retained.map_or(String::new(), |share| format!("{} retained", percent(share)));
            let multiple = adapter.multiple.map_or(String::new(), |multiple| format!(", {multiple:.2}× in the result"));
            Panel {
                title: name.clone(),
                note: format!("{retained}{multiple}, weight {}", adapter.weight),
                cells: map.cells(&values),
            }
        })
        .collect();
    page.section("Share of each adapter that the result can express, by block and Linear");
    page.panels(&map, &panels);
    if count > 1 {
        page.section("Directions in common, mean over the modules of both: outputs above the diagonal, inputs below");
        page.matrix(&names, &overlaps(report));
    }
    let height = page.y + MARGIN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         role=\"img\" aria-label=\"What a merge of {adapters} kept\">\n<style>{STYLE}</style>\n\
         <rect class=\"surface\" width=\"{WIDTH}\" height=\"{height}\"/>\n{}</svg>\n",
        page.body
    )
}

/// Where modules stand in a map: their block across, the last part of their path down.
struct BlockMap {
    /// Numbers of the blocks; `None` for modules outside of blocks.
    blocks: Vec<Option<usize>>,
    kinds: Vec<String>,
    places: Vec<(usize, usize)>,
}

impl BlockMap {
    fn new(modules: &[ModuleMergeReport]) -> Self {
        let found: Vec<(Option<usize>, String)> = modules.iter().map(|module| block_and_kind(&module.name)).collect();
        let mut blocks: Vec<Option<usize>> = found.iter().map(|(block, _)| *block).collect();
        blocks.sort_by_key(|block| block.map_or(usize::MAX, |number| number));
        blocks.dedup();
        let mut kinds: Vec<String> = Vec::new();
        for (_, kind) in &found {
            if !kinds.contains(kind) {
                kinds.push(kind.clone());
            }
        }
        let position = |(block, kind): &(Option<usize>, String)| {
            let across = blocks.iter().position(|other| other == block).unwrap_or(0);
            (across, kinds.iter().position(|other| other == kind).unwrap_or(0))
        };
        let places = found.iter().map(position).collect();
        BlockMap { blocks, kinds, places }
    }

    /// The mean of the values in each cell, by energy, from (module, value, energy).
    fn cells(&self, values: &[(usize, f64, f64)]) -> BTreeMap<(usize, usize), f64> {
        let mut sums: BTreeMap<(usize, usize), (f64, f64, f64, f64)> = BTreeMap::new();
        for &(module, value, energy) in values {
            let sum = sums.entry(self.places[module]).or_default();
            *sum = (sum.0 + value * energy, sum.1 + energy, sum.2 + value, sum.3 + 1.0);
        }
        let mean = |(weighted, energy, plain, count)| if energy > 0.0 { weighted / energy } else { plain / count };
        sums.into_iter().map(|(place, sum)| (place, mean(sum))).collect()
    }

    fn width(&self) -> usize {
        MAP_LABELS + self.blocks.len() * CELL
    }
}

/// `(Some(3), "q_proj")` for `model.layers.3.self_attn.q_proj`.
fn block_and_kind(name: &str) -> (Option<usize>, String) {
    let block = name.split('.').find_map(|part| part.parse().ok());
    (block, name.rsplit('.').next().unwrap_or(name).to_string())
}

/// A map with a heading.
struct Panel {
    title: String,
    note: String,
    cells: BTreeMap<(usize, usize), f64>,
}

/// The mean overlaps of pairs: outputs of `(i, j)` with i < j, inputs of `(j, i)`.
fn overlaps(report: &MergeReport) -> BTreeMap<(usize, usize), f64> {
    let mut sums: BTreeMap<(usize, usize), (f64, f64)> = BTreeMap::new();
    for module in &report.modules {
        for overlap in module.kept.iter().flat_map(|kept| &kept.overlaps) {
            let (first, second) = (module.adapters[overlap.first], module.adapters[overlap.second]);
            for (pair, share) in [((first, second), overlap.outputs), ((second, first), overlap.inputs)] {
                let sum = sums.entry(pair).or_default();
                *sum = (sum.0 + share, sum.1 + 1.0);
            }
        }
    }
    sums.into_iter().map(|(pair, (sum, count))| (pair, sum / count)).collect()
}

/// The last parts of the paths; with the part before where that is not unique.
fn short_names<'a>(paths: impl Iterator<Item = &'a Path> + Clone) -> Vec<String> {
    let last = |path: &Path, parts: usize| {
        let all: Vec<String> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(parts)..].join("/")
    };
    let unique = |name: &str| paths.clone().filter(|path| last(path, 1) == name).count() == 1;
    let name = |path| if unique(&last(path, 1)) { last(path, 1) } else { last(path, 2) };
    paths.clone().map(name).collect()
}

/// What is drawn, and how far down the page it has come.
struct Page {
    body: String,
    y: usize,
}

impl Page {
    fn put(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }

    fn text_at(&mut self, (x, y): (usize, usize), class: &str, text: &str) {
        self.put(&format!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{}</text>", escaped(text)));
    }

    fn text(&mut self, x: usize, class: &str, text: &str) {
        self.text_at((x, self.y), class, text);
    }

    fn cell(&mut self, (x, y): (usize, usize), (width, height): (usize, usize), class: &str, tip: &str) {
        let tip = escaped(tip);
        self.put(&format!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"2\"><title>{tip}</title></rect>"
        ));
    }

    fn section(&mut self, title: &str) {
        self.y += 34;
        self.text(MARGIN, "head", title);
        self.y += 8;
    }

    /// What the colours mean.
    fn legend(&mut self) {
        let y = self.y + 2;
        for step in 0..STEPS {
            let tip = format!("{} to {} %", step * 10, (step + 1) * 10);
            self.cell((MARGIN + step * 22, y), (21, 10), &format!("c{step}"), &tip);
        }
        self.text_at((MARGIN, y + 24), "quiet small", "0 %");
        self.text_at((MARGIN + STEPS * 22 - 1, y + 24), "quiet small right", "100 %");
        let none = MARGIN + STEPS * 22 + 24;
        self.cell((none, y), (CELL - 3, 10), "none", "no module");
        self.text_at((none + CELL + 2, y + 10), "quiet small", "not adapted");
        self.y += 26;
    }

    fn panels(&mut self, map: &BlockMap, panels: &[Panel]) {
        let gap = 36;
        let width = map.width().max(300);
        let across = ((WIDTH - 2 * MARGIN + gap) / (width + gap)).max(1);
        let height = 38 + map.kinds.len() * CELL + 18;
        for row in panels.chunks(across) {
            for (place, panel) in row.iter().enumerate() {
                self.panel(map, panel, MARGIN + place * (width + gap));
            }
            self.y += height + 10;
        }
        self.y -= 10;
    }

    fn panel(&mut self, map: &BlockMap, panel: &Panel, x: usize) {
        let top = self.y + 32;
        self.text_at((x, top - 18), "", &shortened(&panel.title, 40));
        self.text_at((x, top - 4), "quiet small", &panel.note);
        let left = x + MAP_LABELS;
        for (down, kind) in map.kinds.iter().enumerate() {
            let y = top + 4 + down * CELL;
            self.text_at((left - 6, y + 11), "quiet small right", &shortened(kind, 15));
            for across in 0..map.blocks.len() {
                if !map.places.contains(&(across, down)) {
                    continue;
                }
                let block = map.blocks[across].map_or(String::new(), |number| format!("block {number}, "));
                let (class, tip) = match panel.cells.get(&(across, down)) {
                    Some(&value) => (step_class(value), format!("{block}{kind}: {}", percent(value))),
                    None => ("none".to_string(), format!("{block}{kind}: not adapted")),
                };
                self.cell((left + across * CELL, y), (CELL - 2, CELL - 2), &class, &tip);
            }
        }
        let below = top + 4 + map.kinds.len() * CELL + 11;
        let every = map.blocks.len().div_ceil(32).max(1) * if map.blocks.len() > 12 { 4 } else { 1 };
        for (across, block) in map.blocks.iter().enumerate() {
            if let Some(number) = block.filter(|number| number % every == 0) {
                self.text_at((left + across * CELL + 7, below), "quiet small middle", &number.to_string());
            }
        }
    }

    fn matrix(&mut self, names: &[String], shares: &BTreeMap<(usize, usize), f64>) {
        let (width, height) = MATRIX_CELL;
        let left = MARGIN + 150;
        let width = width.min((WIDTH - MARGIN - left) / names.len()).max(8);
        let top = self.y + 10;
        for (i, name) in names.iter().enumerate() {
            let y = top + i * height;
            self.text_at((left - 8, y + 17), "right", &shortened(name, 22));
            for (j, other) in names.iter().enumerate() {
                let at = (left + j * width, y);
                let Some(&share) = shares.get(&(i, j)) else {
                    let tip =
                        if i == j { name.clone() } else { format!("{name} and {other} have no module in common") };
                    self.cell(at, (width - 2, height - 2), "none", &tip);
                    continue;
                };
                let what = if i < j { "outputs" } else { "inputs" };
                self.cell(
                    at,
                    (width - 2, height - 2),
                    &step_class(share),
                    &format!("{name} and {other}, {what}: {}", percent(share)),
                );
                if width >= 30 {
                    let class = if share * STEPS as f64 >= 5.0 { "high" } else { "low" };
                    let middle = (at.0 + width / 2 - 1, y + 16);
                    self.text_at(middle, &format!("small middle {class}"), &format!("{:.0} %", 100.0 * share));
                }
            }
        }
        self.y = top + names.len() * height;
    }
}

fn step_class(share: f64) -> String {
    format!("c{}", ((share * STEPS as f64) as usize).min(STEPS - 1))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn shortened(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => format!("{}…", text.chars().take(most - 1).collect::<String>()),
        false => text.to_string(),
    }
}

fn escaped(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_stand_in_their_block_and_names_in_the_page() {
        assert_eq!(block_and_kind("model.layers.12.self_attn.q_proj"), (Some(12), "q_proj".into()));
        assert_eq!(block_and_kind("lm_head"), (None, "lm_head".into()));
        assert_eq!(escaped("<a & \"b\"\n>"), "&lt;a &amp; &quot;b&quot; &gt;");
        assert_eq!(shortened("shakespeare", 6), "shake…");
        let names = short_names(["a/legal", "b/legal", "c/other"].iter().map(Path::new));
        assert_eq!(names, ["a/legal", "b/legal", "other"]);
        assert_eq!((step_class(0.0), step_class(0.99), step_class(7.0)), ("c0".into(), "c9".into(), "c9".into()));
    }
}
