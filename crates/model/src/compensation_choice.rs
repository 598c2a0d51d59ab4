use std::collections::btree_map::Entry;
use std::path::PathBuf;

use kintsugi_checkpoint::{Checkpoint, read_adapter};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, AdapterEntry, LowRank};

/// Which compensation goes into the products of a model when it is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompensationChoice {
    /// That in `eora/` of the checkpoint.
    pub own: bool,
    /// Another PEFT folder, to be added.
    pub folder: Option<PathBuf>,
    /// Of each no more than this many directions: ranks are nested, so a part of a compensation is one of less rank.
    pub rank: Option<usize>,
}

impl Default for CompensationChoice {
    /// What the checkpoint has, all of it.
    fn default() -> Self {
        CompensationChoice { own: true, folder: None, rank: None }
    }
}

impl CompensationChoice {
    /// None at all.
    pub fn nothing() -> Self {
        CompensationChoice { own: false, folder: None, rank: None }
    }

    /// Reads what was chosen; `None` when there is nothing.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` for a folder that is damaged, does not belong to the checkpoint, or has biases whose ranks
    /// cannot be divided as they should.
    pub fn read(&self, checkpoint: &Checkpoint) -> Result<Option<Adapter>> {
        let own = if self.own { checkpoint.compensation()? } else { None };
        let other = self.folder.as_ref().map(|folder| {
            let adapter = read_adapter(folder)?;
            checkpoint.check_compensation(&adapter).map(|()| adapter)
        });
        let mut all: Option<Adapter> = None;
        for adapter in own.into_iter().chain(other.transpose()?) {
            let sum = all.get_or_insert_with(Adapter::default);
            for (name, entry) in adapter.linears {
                let factors = self.part_of(&name, entry)?;
                match sum.linears.entry(name) {
                    Entry::Vacant(place) => drop(place.insert(AdapterEntry { factors, scaling: 1.0 })),
                    Entry::Occupied(mut place) => place.get_mut().factors = place.get().factors.beside(&factors),
                }
            }
        }
        Ok(all)
    }

    /// The leading directions of an entry, with its scaling in B.
    fn part_of(&self, name: &str, AdapterEntry { factors, scaling }: AdapterEntry) -> Result<LowRank> {
        let part = match self.rank {
            Some(rank) if (1..factors.rank()).contains(&rank) && !factors.is_divisible() => {
                let message = "the compensation has a bias, and factor_centres.safetensors, which says what it is of \
                               less rank, is not beside it";
                return Err(Error::new(ErrorCode::AdapterInvalid, message)
                    .subject(name)
                    .hint("Copy that file too, or leave eoraRank out"));
            }
            Some(rank) if rank < factors.rank() => factors.prefix(rank),
            _ => factors,
        };
        Ok(if scaling == 1.0 { part } else { part.scaled(scaling) })
    }
}
