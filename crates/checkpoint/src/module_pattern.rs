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

    /// Whether the expression matches the module.
    pub(crate) fn matches(&self, module: &str) -> bool {
        let characters: Vec<char> = module.chars().collect();
        let Some(start) = characters.len().checked_sub(self.atoms.len()) else { return false };
        let begins_well = start == 0 || (!self.from_start && characters[start - 1] == '.');
        begins_well
            && characters[start..].iter().zip(&self.atoms).all(|(character, atom)| match atom {
                Atom::Any => *character != '\n',
                Atom::Exactly(expected) => character == expected,
            })
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
            assert_eq!(ModulePattern::parse(key).unwrap().matches(module), expected, "{key} on {module}");
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
