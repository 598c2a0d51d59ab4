use std::collections::HashMap;

/// A key of PEFT's `rank_pattern` or `alpha_pattern`: a regular expression that must match a module name from its
/// start or from behind a dot to its end (`(.*\.)?(KEY)$`, `get_pattern_key` of peft).
///
/// Understood are names, in which a dot stands for any character as it does in the expression, escaped characters,
/// and a `^` in front that ties the name to the start. Real expressions are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModulePattern {
    atoms: Vec<Atom>,
    from_start: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Atom {
    Any,
    Exactly(char),
}

impl ModulePattern {
    /// `None` when `key` is an expression that goes beyond names.
    pub(crate) fn parse(key: &str) -> Option<Self> {
        let (from_start, name) = match key.strip_prefix('^') {
            Some(name) => (true, name),
            None => (false, key),
        };
        let mut atoms = Vec::new();
        let mut characters = name.chars();
        while let Some(character) = characters.next() {
            atoms.push(match character {
                '.' => Atom::Any,
                // An escaped letter or digit is a class or a reference, not a character.
                '\\' => Atom::Exactly(characters.next().filter(|escaped| escaped.is_ascii_punctuation())?),
                '*' | '+' | '?' | '|' | '(' | ')' | '[' | ']' | '{' | '}' | '^' | '$' => return None,
                plain => Atom::Exactly(plain),
            });
        }
        Some(ModulePattern { atoms, from_start })
    }

    fn shape(&self) -> Shape {
        let any = (0..self.atoms.len()).filter(|&place| self.atoms[place] == Atom::Any).collect();
        Shape { length: self.atoms.len(), any, from_start: self.from_start }
    }

    /// The characters, with a dot for any.
    fn text(&self) -> String {
        self.atoms.iter().map(|atom| if let Atom::Exactly(character) = atom { *character } else { '.' }).collect()
    }
}

/// What patterns say, found by module. Adapters of models with experts have tens of thousands of both.
#[derive(Debug)]
pub(crate) struct PatternTable<T> {
    /// Patterns of one shape differ in their characters alone; the number is their place in the file.
    shapes: Vec<(Shape, Numbered<T>)>,
}

/// Values by the text of their pattern, with its place in the file.
type Numbered<T> = HashMap<String, (usize, T)>;

/// Where a pattern has characters and where any.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shape {
    length: usize,
    any: Vec<usize>,
    from_start: bool,
}

impl Shape {
    /// What the text of a pattern of this shape must be to match the module; `None` when none can.
    fn text_for(&self, module: &[char]) -> Option<String> {
        let start = module.len().checked_sub(self.length)?;
        let begins_well = start == 0 || (!self.from_start && module[start - 1] == '.');
        let mut text = module[start..].to_vec();
        for &place in &self.any {
            if text[place] == '\n' {
                return None;
            }
            text[place] = '.';
        }
        begins_well.then(|| text.into_iter().collect())
    }
}

impl<T: Copy> PatternTable<T> {
    /// In the order of the file.
    pub(crate) fn new(patterns: impl IntoIterator<Item = (ModulePattern, T)>) -> Self {
        let mut places: HashMap<Shape, usize> = HashMap::new();
        let mut shapes: Vec<(Shape, Numbered<T>)> = Vec::new();
        for (number, (pattern, value)) in patterns.into_iter().enumerate() {
            let shape = pattern.shape();
            let place = *places.entry(shape.clone()).or_insert_with(|| {
                shapes.push((shape, HashMap::new()));
                shapes.len() - 1
            });
            shapes[place].1.entry(pattern.text()).or_insert((number, value));
        }
        PatternTable { shapes }
    }

    /// What the first pattern that matches the module says.
    pub(crate) fn first_match(&self, module: &str) -> Option<T> {
        let module: Vec<char> = module.chars().collect();
        let found = self.shapes.iter().filter_map(|(shape, values)| values.get(&shape.text_for(&module)?));
        found.min_by_key(|(number, _)| number).map(|&(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_as_the_regular_expression_does() {
        let cases = [
            ("q_proj", "model.layers.0.self_attn.q_proj", true),
            ("q_proj", "q_proj", true),
            ("q_proj", "model.layers.0.self_attn.xq_proj", false),
            ("q_proj", "model.layers.0.self_attn.q_proj.inner", false),
            ("layers.1.q_proj", "model.layers.1.q_proj", true),
            ("layers.1.q_proj", "model.layers.11.q_proj", false),
            ("layers.1.q_proj", "model.layers.1xq_proj", true),
            (r"layers\.1\.q_proj", "model.layers.1xq_proj", false),
            (r"layers\.1\.q_proj", "model.layers.1.q_proj", true),
            ("^model.q_proj", "model.q_proj", true),
            ("^model.q_proj", "base.model.q_proj", false),
            ("Q_proj", "model.q_proj", false),
        ];
        for (key, module, expected) in cases {
            let table = PatternTable::new([(ModulePattern::parse(key).unwrap(), ())]);
            assert_eq!(table.first_match(module).is_some(), expected, "{key} on {module}");
        }
    }

    #[test]
    fn the_first_that_matches_counts() {
        let keys = ["b.q_proj", "a.b.q_proj", "q_proj", "^a.b.q_proj", "b.q_proj", "q_proj"];
        let pattern = |(number, key): (usize, &&str)| (ModulePattern::parse(key).unwrap(), number);
        for skipped in 0..keys.len() {
            let table = PatternTable::new(keys.iter().enumerate().skip(skipped).map(pattern));
            assert_eq!(table.first_match("a.b.q_proj"), Some(skipped));
            assert_eq!(table.first_match("a.b.k_proj"), None);
        }
    }

    #[test]
    fn real_expressions_are_not_understood() {
        for key in
            ["q_proj|k_proj", ".*q_proj", "layers.[0-9].q_proj", r"layers\.\d.q_proj", "(q|k)_proj", "q_proj$", "a\\"]
        {
            assert_eq!(ModulePattern::parse(key), None, "{key}");
        }
    }
}
