use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Error, ErrorCode, Result};

/// Writes `bytes` so that `path` holds either its old content or all of the new: temporary name, fsync, rename.
///
/// # Errors
/// `ERR_OUTPUT_UNWRITABLE`; the temporary file is removed.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    let temporary = path.with_file_name(name);
    let written = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        Error::unwritable(path, &error)
    })
}

/// A folder that is filled under the name `OUT.partial` and becomes `OUT` by one rename.
///
/// Dropped before [`StagedFolder::commit`], it removes what it holds, so that nothing half-written stays; unless
/// [`StagedFolder::keep`] said that a later run goes on with it.
#[derive(Debug)]
pub struct StagedFolder {
    staging: PathBuf,
    target: PathBuf,
    kept: bool,
}

impl StagedFolder {
    /// Creates `target.partial` afresh.
    ///
    /// # Errors
    /// `ERR_OUTPUT_NOT_EMPTY` when `target` exists and is not an empty folder, `ERR_OUTPUT_UNWRITABLE` when the
    /// staging folder cannot be made.
    pub fn create(target: &Path) -> Result<Self> {
        let staging = Self::staging(target)?;
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(|error| Error::unwritable(&staging, &error))?;
        }
        fs::create_dir_all(&staging).map_err(|error| Error::unwritable(&staging, &error))?;
        Ok(StagedFolder { staging, target: target.to_path_buf(), kept: false })
    }

    /// The staging folder that an earlier run kept, `None` when there is none. It is kept from the start.
    ///
    /// # Errors
    /// As [`StagedFolder::create`].
    pub fn reopen(target: &Path) -> Result<Option<Self>> {
        let staging = Self::staging(target)?;
        Ok(staging.is_dir().then(|| StagedFolder { staging, target: target.to_path_buf(), kept: true }))
    }

    /// The name of the staging folder, when `target` may be written.
    fn staging(target: &Path) -> Result<PathBuf> {
        match fs::read_dir(target) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(Error::new(ErrorCode::OutputNotEmpty, "the output folder exists and is not empty")
                        .subject(target.display())
                        .hint("Choose another output folder or remove this one"));
                }
            }
            Err(_) if target.exists() => {
                return Err(Error::new(ErrorCode::OutputUnwritable, "the output path exists and is not a folder")
                    .subject(target.display())
                    .hint("Choose another output folder"));
            }
            Err(_) => {}
        }
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        if name.is_empty() {
            return Err(Error::new(ErrorCode::OutputUnwritable, "the output path has no name")
                .subject(target.display())
                .hint("Give a folder name, for example 'models/base-w4'"));
        }
        name.push(".partial");
        Ok(target.with_file_name(name))
    }

    /// Leaves the folder where it is when this is dropped, so that a later run can [`StagedFolder::reopen`] it.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Removes the folder when this is dropped, kept before or not.
    pub fn discard(&mut self) {
        self.kept = false;
    }

    /// Where files are written until [`StagedFolder::commit`].
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// Gives the folder its final name.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; the staging folder is removed then, unless it is kept.
    pub fn commit(mut self) -> Result<()> {
        let renamed = sync_folder(&self.staging)
            .and_then(|()| if self.target.exists() { fs::remove_dir(&self.target) } else { Ok(()) })
            .and_then(|()| fs::rename(&self.staging, &self.target));
        renamed.map_err(|error| Error::unwritable(&self.target, &error))?;
        self.kept = true;
        if let Some(parent) = self.target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            // The rename itself has happened; a file system that cannot sync a folder does not undo it.
            let _ = sync_folder(parent);
        }
        Ok(())
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_dir_all(&self.staging);
        }
    }
}

fn sync_folder(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    File::open(path)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kintsugi-runtime-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn a_dropped_folder_leaves_nothing_and_a_committed_one_is_whole() {
        let root = scratch("staged");
        let out = root.join("out");
        {
            let staged = StagedFolder::create(&out).unwrap();
            fs::write(staged.path().join("half"), b"x").unwrap();
        }
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);

        let staged = StagedFolder::create(&out).unwrap();
        fs::write(staged.path().join("whole"), b"x").unwrap();
        staged.commit().unwrap();
        assert_eq!(fs::read(out.join("whole")).unwrap(), b"x");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);

        assert_eq!(StagedFolder::create(&out).unwrap_err().code, ErrorCode::OutputNotEmpty);
        assert_eq!(StagedFolder::reopen(&out).unwrap_err().code, ErrorCode::OutputNotEmpty);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_kept_folder_is_found_again() {
        let root = scratch("kept");
        let out = root.join("out");
        assert!(StagedFolder::reopen(&out).unwrap().is_none());
        {
            let mut staged = StagedFolder::create(&out).unwrap();
            fs::write(staged.path().join("half"), b"x").unwrap();
            staged.keep();
        }
        let staged = StagedFolder::reopen(&out).unwrap().unwrap();
        assert_eq!(fs::read(staged.path().join("half")).unwrap(), b"x");
        drop(staged);
        StagedFolder::reopen(&out).unwrap().unwrap().commit().unwrap();
        assert_eq!(fs::read(out.join("half")).unwrap(), b"x");
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_refused_write_leaves_no_temporary_file() {
        let root = scratch("replace");
        let target = root.join("folder");
        fs::create_dir_all(target.join("child")).unwrap();
        assert_eq!(replace_file(&target, b"x").unwrap_err().code, ErrorCode::OutputUnwritable);
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
        replace_file(&root.join("file"), b"new").unwrap();
        assert_eq!(fs::read(root.join("file")).unwrap(), b"new");
        fs::remove_dir_all(&root).unwrap();
    }
}
