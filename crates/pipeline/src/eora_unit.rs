use kintsugi_model::DecoderSpec;

/// Linears of a block that one compensation is solved for: a single one, or all that read one input and share an A.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EoraUnit {
    /// Their places in [`DecoderSpec::linears`], ascending.
    pub(crate) places: Vec<usize>,
    /// Outputs of all of them.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) columns: usize,
}

impl EoraUnit {
    /// Those of a block, in the order of their first Linears; each of one Linear unless they are grouped by input.
    pub(crate) fn of_block(spec: &DecoderSpec, grouped: bool) -> Vec<EoraUnit> {
        let mut units: Vec<EoraUnit> = Vec::new();
        for (place, linear) in spec.linears.iter().enumerate() {
            let shares = |unit: &&mut EoraUnit| spec.linears[unit.places[0]].slot.tap() == linear.slot.tap();
            let known = if grouped { units.iter_mut().find(shares) } else { None };
            match known {
                Some(unit) => {
                    unit.places.push(place);
                    unit.rows += linear.rows;
                }
                None => units.push(EoraUnit { places: vec![place], rows: linear.rows, columns: linear.columns }),
            }
        }
        units
    }

    /// The largest rank up to `rank` that its factors can have.
    pub(crate) fn rank(&self, rank: usize) -> usize {
        rank.min(self.rows).min(self.columns)
    }

    /// Inputs of the A that is counted with a Linear: an A that several share is counted with the first of them.
    pub(crate) fn counted_columns(&self, place: usize) -> usize {
        if place == self.places[0] { self.columns } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kintsugi_checkpoint::Checkpoint;

    use super::*;

    #[test]
    fn linears_of_one_input_are_a_unit_where_they_are_grouped() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/llama-7m");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let spec = DecoderSpec::of(&checkpoint).unwrap();
        let places = |grouped| -> Vec<Vec<usize>> {
            EoraUnit::of_block(&spec, grouped).into_iter().map(|unit| unit.places).collect()
        };
        assert_eq!(places(false), (0..7).map(|place| vec![place]).collect::<Vec<_>>());
        let mut grouped = places(true);
        grouped.sort_by_key(Vec::len);
        assert_eq!(grouped.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 2, 3]);
        for unit in EoraUnit::of_block(&spec, true) {
            let taps = unit.places.iter().map(|&place| spec.linears[place].slot.tap());
            assert!(taps.clone().all(|tap| Some(tap) == taps.clone().next()));
            assert_eq!(unit.rows, unit.places.iter().map(|&place| spec.linears[place].rows).sum::<usize>());
            let counted: usize = unit.places.iter().map(|&place| unit.counted_columns(place)).sum();
            assert_eq!((counted, unit.rank(1 << 20)), (unit.columns, unit.columns.min(unit.rows)));
        }
    }
}
