use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Largest ledger that is read; a record of a block takes some kilobytes.
const LEDGER_LIMIT: u64 = 1 << 30;

/// What a job records of a finished unit of its work.
pub trait RecordedUnit: Serialize + DeserializeOwned {
    /// Files in the folder of the ledger that a later run opens.
    fn file_names(&self) -> Vec<&str>;

    /// Whether a job can have written it.
    fn is_sound(&self) -> bool;
}

/// One record per finished unit of work in `OUT.partial/ledger.jsonl`: what makes a job resumable.
///
/// The first line says what the job is; every further line is a unit, written when all that it speaks of is on the disk.
/// A line that is not whole was being written when the process ended, and is dropped.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Ledger {
    const FILE_NAME: &'static str = "ledger.jsonl";

    /// Starts a ledger in the staging folder of a job.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn create(folder: &Path, identity: &Value) -> Result<Self> {
        let path = folder.join(Self::FILE_NAME);
        let file = File::create(&path).map_err(|error| Error::unwritable(&path, &error))?;
        let mut ledger = Ledger { file, path, bytes: 0 };
        ledger.lock()?;
        ledger.append_line(identity)?;
        Ok(ledger)
    }

    /// Opens the ledger that an earlier run left beside `out`, with the units that it had finished. `None` when there
    /// is none, or it had finished nothing.
    ///
    /// # Errors
    /// `ERR_RESUME_MISMATCH`, naming what differs, when it belongs to another job; `ERR_OUTPUT_BUSY` while that job
    /// runs; `ERR_OUTPUT_UNWRITABLE`.
    pub fn reopen<U: RecordedUnit>(out: &Path, identity: &Value) -> Result<Option<(Self, Vec<U>)>> {
        let mut name = out.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let folder = out.with_file_name(name);
        let path = folder.join(Self::FILE_NAME);
        // A pipe would open and never end.
        if !path.is_file() {
            return Ok(None);
        }
        let Ok(file) = File::options().read(true).append(true).open(&path) else { return Ok(None) };
        let mut ledger = Ledger { file, path, bytes: 0 };
        ledger.lock()?;
        let mut text = Vec::new();
        let read = Read::by_ref(&mut ledger.file).take(LEDGER_LIMIT).read_to_end(&mut text);
        read.map_err(|error| Error::unwritable(&ledger.path, &error))?;

        let mut lines = text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let Some(first) = lines.next() else { return Ok(None) };
        ledger.bytes = first.len() as u64;
        let begun = serde_json::from_slice(first).unwrap_or(Value::Null);
        if let Some(difference) = difference(&begun, identity) {
            return Err(Error::new(
                ErrorCode::ResumeMismatch,
                format!("the job that was interrupted had {difference}"),
            )
            .subject(folder.display())
            .hint("Repeat the command that began it, or discard what it left with fresh (--fresh)"));
        }
        let mut units = Vec::new();
        for line in lines {
            let Some(unit) = serde_json::from_slice::<U>(line).ok().filter(U::is_sound) else { break };
            if let Some(name) = unit.file_names().into_iter().find(|name| !is_plain_name(name)) {
                let message = format!("the ledger names '{name}', which is not the name of a file beside it");
                return Err(Error::new(ErrorCode::ResumeMismatch, message)
                    .subject(ledger.path.display())
                    .hint("Discard what the interrupted job left with fresh (--fresh)"));
            }
            units.push(unit);
            ledger.bytes += line.len() as u64;
        }
        ledger.file.set_len(ledger.bytes).map_err(|error| Error::unwritable(&ledger.path, &error))?;
        Ok((!units.is_empty()).then_some((ledger, units)))
    }

    /// Records a unit.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn append(&mut self, unit: &impl RecordedUnit) -> Result<()> {
        self.append_line(unit)
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Removes the file: the job is done but for the name of its folder.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(|error| Error::unwritable(&self.path, &error))
    }

    fn append_line(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| Error::new(ErrorCode::Internal, format!("a record cannot be written: {error}")))?;
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.map_err(|error| Error::unwritable(&self.path, &error))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn lock(&self) -> Result<()> {
        self.file.try_lock().map_err(|_| {
            Error::new(ErrorCode::OutputBusy, "another job is writing to this output")
                .subject(self.path.display())
                .hint("Wait for it, or choose another output folder")
        })
    }
}

/// The first thing in which the identities of two jobs differ, as a clause.
fn difference(begun: &Value, now: &Value) -> Option<String> {
    differing(begun, now, "").map(|(name, begun, now)| match begun {
        Value::Null => format!("no {name}, this one has {now}"),
        _ => format!("{name} {begun}, this one has {now}"),
    })
}

fn differing(begun: &Value, now: &Value, name: &str) -> Option<(String, Value, Value)> {
    match (begun, now) {
        (Value::Object(begun), Value::Object(now)) => {
            let names = now.keys().chain(begun.keys());
            names.into_iter().find_map(|key| {
                let of = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                differing(&of(begun), &of(now), &name)
            })
        }
        (Value::Array(begun), Value::Array(now)) if begun.len() == now.len() => {
            let mut pairs = begun.iter().zip(now).enumerate();
            pairs.find_map(|(index, (begun, now))| differing(begun, now, &format!("{name}[{index}]")))
        }
        _ if begun == now => None,
        _ => Some((name.to_owned(), begun.clone(), now.clone())),
    }
}

/// Neither a path upwards nor an absolute one.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) && !name.contains(['/', '\\', ':'])
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Default, Serialize, Deserialize)]
    struct Unit {
        seconds: f64,
        file: Option<String>,
    }

    impl RecordedUnit for Unit {
        fn file_names(&self) -> Vec<&str> {
            self.file.as_deref().into_iter().collect()
        }

        fn is_sound(&self) -> bool {
            self.seconds >= 0.0
        }
    }

    fn unit(seconds: f64) -> Unit {
        Unit { seconds, file: None }
    }

    fn reopen(out: &Path, identity: &Value) -> Result<Option<(Ledger, Vec<Unit>)>> {
        Ledger::reopen(out, identity)
    }

    #[test]
    fn units_come_back_without_a_torn_line() {
        let root = tempfile::tempdir().unwrap();
        let (out, staging) = (root.path().join("out"), root.path().join("out.partial"));
        let identity = json!({ "recipe": { "bits": 4 } });
        assert!(reopen(&out, &identity).unwrap().is_none());
        fs::create_dir(&staging).unwrap();
        let mut ledger = Ledger::create(&staging, &identity).unwrap();
        assert_eq!(reopen(&out, &identity).err().unwrap().code, ErrorCode::OutputBusy);
        drop(ledger);
        assert!(reopen(&out, &identity).unwrap().is_none(), "nothing was finished");

        ledger = Ledger::create(&staging, &identity).unwrap();
        ledger.append(&unit(1.0)).unwrap();
        ledger.append(&unit(2.0)).unwrap();
        drop(ledger);
        let path = staging.join(Ledger::FILE_NAME);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let finished = reopen(&out, &identity).unwrap().map_or(0, |(_, units)| units.len());
            let lines = whole[..cut].iter().filter(|&&byte| byte == b'\n').count();
            assert_eq!(finished, lines.saturating_sub(1), "cut at {cut}");
        }
        fs::write(&path, [&whole[..], b"{\"seconds\":1"].concat()).unwrap();
        let (mut ledger, units) = reopen(&out, &identity).unwrap().unwrap();
        assert_eq!(units.iter().map(|unit| unit.seconds).collect::<Vec<_>>(), [1.0, 2.0]);
        ledger.append(&unit(3.0)).unwrap();
        drop(ledger);
        assert_eq!(reopen(&out, &identity).unwrap().unwrap().1.len(), 3);

        let (mut ledger, _) = reopen(&out, &identity).unwrap().unwrap();
        ledger.append(&unit(-1.0)).unwrap();
        ledger.append(&unit(4.0)).unwrap();
        drop(ledger);
        assert_eq!(reopen(&out, &identity).unwrap().unwrap().1.len(), 3, "what no job writes ends it");
    }

    #[test]
    fn files_outside_of_the_folder_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let (out, staging) = (root.path().join("out"), root.path().join("out.partial"));
        fs::create_dir(&staging).unwrap();
        for name in ["../input", "/etc/passwd", "a/../../input", "..", "", "a/b", "..\\input", "C:input"] {
            let mut ledger = Ledger::create(&staging, &json!({})).unwrap();
            ledger.append(&Unit { file: Some(name.into()), ..unit(1.0) }).unwrap();
            drop(ledger);
            let error = reopen(&out, &json!({})).err().unwrap();
            assert_eq!(error.code, ErrorCode::ResumeMismatch, "{name}");
            assert!(error.subject.ends_with(Ledger::FILE_NAME) && !error.hint.is_empty(), "{error}");
        }
        let mut ledger = Ledger::create(&staging, &json!({})).unwrap();
        ledger.append(&Unit { file: Some("activations-00001".into()), ..unit(1.0) }).unwrap();
        drop(ledger);
        assert_eq!(reopen(&out, &json!({})).unwrap().unwrap().1.len(), 1);
    }

    #[test]
    fn what_differs_is_named() {
        let begun = json!({ "engine": "cpu", "recipe": { "bits": 4, "eora": null, "sources": [{ "file": "x" }, { "file": "y" }] }, "inputs": { "a": "1" } });
        assert_eq!(difference(&begun, &begun), None);
        let cases = [
            ("/recipe/bits", json!(3), "recipe.bits 4, this one has 3"),
            ("/recipe/eora", json!({ "rank": 8 }), "no recipe.eora, this one has {\"rank\":8}"),
            ("/recipe/sources/1/file", json!("z"), "recipe.sources[1].file \"y\", this one has \"z\""),
            (
                "/recipe/sources",
                json!([{ "file": "x" }]),
                "recipe.sources [{\"file\":\"x\"},{\"file\":\"y\"}], this one has [{\"file\":\"x\"}]",
            ),
            ("/inputs/a", json!("2"), "inputs.a \"1\", this one has \"2\""),
        ];
        for (pointer, value, expected) in cases {
            let mut now = begun.clone();
            *now.pointer_mut(pointer).unwrap() = value;
            assert_eq!(difference(&begun, &now).unwrap(), expected);
        }
        assert!(difference(&json!(null), &begun).is_some());
    }
}
