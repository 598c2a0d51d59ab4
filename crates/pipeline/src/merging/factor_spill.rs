use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, Result};
use kintsugi_weights::{ElementType, LowRank};

/// Factors on the disk, for as long as the ranks of the file that they belong into are not known. The file lies beside
/// the output, under a name that no other merge has, and is removed with this.
#[derive(Debug)]
pub(crate) struct FactorSpill {
    path: PathBuf,
    output: BufWriter<File>,
    /// Start and rank of each module.
    modules: Vec<(u64, usize)>,
    end: u64,
}

impl FactorSpill {
    pub(crate) fn create(out: &Path) -> Result<Self> {
        if let Some(parent) = out.parent() {
            fs::create_dir_all(parent).map_err(|error| Error::unwritable(parent, &error))?;
        }
        let mut number = 0;
        loop {
            let mut name = out.file_name().unwrap_or_default().to_os_string();
            name.push(format!(".factors-{}-{number}.partial", std::process::id()));
            let path = out.with_file_name(name);
            match File::options().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => {
                    return Ok(FactorSpill { path, output: BufWriter::new(file), modules: Vec::new(), end: 0 });
                }
                // Another merge of this process, or what a killed one left.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(Error::unwritable(&path, &error)),
            }
        }
    }

    /// Appends the factors of the next module.
    pub(crate) fn push(&mut self, factors: Option<&LowRank>) -> Result<()> {
        self.modules.push((self.end, factors.map_or(0, LowRank::rank)));
        let Some(factors) = factors else { return Ok(()) };
        for values in [factors.b(), factors.a()] {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            self.output.write_all(bytes).map_err(|error| Error::unwritable(&self.path, &error))?;
            self.end += bytes.len() as u64;
        }
        Ok(())
    }

    /// The factors of a module.
    pub(crate) fn read(
        &mut self,
        index: usize,
        out_features: usize,
        in_features: usize,
        factor_type: ElementType,
    ) -> Result<Option<LowRank>> {
        let (start, rank) = self.modules[index];
        if rank == 0 {
            return Ok(None);
        }
        let read = |count: usize, input: &mut BufReader<&File>| -> io::Result<Vec<f32>> {
            let mut values = vec![0.0f32; count];
            input.read_exact(bytemuck::cast_slice_mut(&mut values))?;
            Ok(values)
        };
        let mut both = || {
            self.output.flush()?;
            let mut input = BufReader::new(self.output.get_ref());
            input.seek(SeekFrom::Start(start))?;
            Ok((read(out_features * rank, &mut input)?, read(rank * in_features, &mut input)?))
        };
        let (b, a) = both().map_err(|error: io::Error| Error::unwritable(&self.path, &error))?;
        Ok(Some(LowRank::new(out_features, in_features, rank, b, a, factor_type)))
    }
}

impl Drop for FactorSpill {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_merges_into_one_folder_do_not_share_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("new").join("out");
        let factors = |value: f32| LowRank::new(2, 3, 1, vec![value; 2], vec![value; 3], ElementType::F32);
        let mut spills = [1.0, 2.0].map(|value| (value, FactorSpill::create(&out).unwrap()));
        for (value, spill) in &mut spills {
            spill.push(None).unwrap();
            spill.push(Some(&factors(*value))).unwrap();
        }
        for (value, spill) in &mut spills {
            assert!(spill.read(0, 2, 3, ElementType::F32).unwrap().is_none());
            assert_eq!(spill.read(1, 2, 3, ElementType::F32).unwrap().unwrap().a(), [*value; 3]);
        }
        drop(spills);
        assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 0);
    }
}
