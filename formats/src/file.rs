//! Floor 0, bytes on disk: memory maps that many owners share, and writes that happen whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// A read-only memory map of a file.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
    /// For reads that leave the map alone.
    #[cfg(unix)]
    file: File,
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or it is a folder.
    pub fn open(path: &Path) -> Result<MappedFile> {
        let map = || -> Result<MappedFile> {
            let file = File::open(path)?;
            if !file.metadata()?.is_file() {
                return Err(Error::new(Kind::NotAFile));
            }
            // SAFETY: the map is read-only, and this program never changes a checkpoint in place: it
            // writes beside it and renames, which leaves the mapped file as it was. Another program that
            // truncates or rewrites the file under us breaks this; every reader that maps shares that
            // limit, and a copy of a checkpoint in memory is the cost that mapping exists to avoid.
            #[expect(unsafe_code, reason = "a memory map cannot be made without it")]
            let map = unsafe { memmap2::Mmap::map(&file) }?;
            Ok(MappedFile {
                map,
                #[cfg(unix)]
                file,
            })
        };
        map().map_err(|e| e.in_file(path))
    }

    /// Reads bytes from an offset, through the file where the system can: pages of the map that are
    /// touched count as memory of the process, pages that the system reads for it do not.
    fn read_at(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset as u64);
        #[cfg(not(unix))]
        {
            out.copy_from_slice(&self.map[offset..offset + out.len()]);
            Ok(())
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[derive(Clone)]
enum Owner {
    Mapped(Arc<MappedFile>),
    Heap(Arc<Vec<u8>>),
}

/// A range of bytes that keeps its mapped file or buffer alive; a clone copies no bytes.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes of a whole file, mapped.
    ///
    /// # Errors
    /// See [`MappedFile::open`].
    pub fn map(path: &Path) -> Result<Bytes> {
        MappedFile::open(path).map(Bytes::from)
    }

    /// A part of these bytes, with the same owner.
    ///
    /// # Panics
    /// `range` does not lie inside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.len(), "slice outside of the bytes");
        let start = self.range.start;
        Bytes { owner: self.owner.clone(), range: start + range.start..start + range.end }
    }
}

impl Bytes {
    /// Copies the bytes from `start` on to `out`. Unlike reading the slice, this does not make the pages of
    /// a mapped file resident in the process: use it to stream what is larger than memory.
    ///
    /// # Errors
    /// The file cannot be read.
    ///
    /// # Panics
    /// The range does not lie inside.
    pub fn read_at(&self, start: usize, out: &mut [u8]) -> io::Result<()> {
        let end = start.checked_add(out.len()).filter(|&end| end <= self.len());
        let end = end.expect("a part of the bytes");
        match &self.owner {
            Owner::Mapped(file) => file.read_at(self.range.start + start, out),
            Owner::Heap(_) => {
                out.copy_from_slice(&self[start..end]);
                Ok(())
            }
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::Mapped(file) => file,
            Owner::Heap(bytes) => bytes,
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Bytes { range: 0..bytes.len(), owner: Owner::Heap(Arc::new(bytes)) }
    }
}

impl From<MappedFile> for Bytes {
    fn from(file: MappedFile) -> Bytes {
        Bytes { range: 0..file.len(), owner: Owner::Mapped(Arc::new(file)) }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let owner = match self.owner {
            Owner::Mapped(_) => "mapped",
            Owner::Heap(_) => "heap",
        };
        write!(f, "Bytes({owner}, {} bytes)", self.len())
    }
}

/// The identity of a file's content: `blake3:` and 64 hexadecimal digits.
///
/// Reads through a small buffer, not through a map, so that hashing a model does not fill the
/// process's resident memory with it.
///
/// # Errors
/// The file cannot be read.
pub fn fingerprint(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    update_hasher(&mut hasher, path)?;
    Ok(format!("blake3:{}", hasher.finalize()))
}

/// Feeds the content of a file to a hasher.
pub(crate) fn update_hasher(hasher: &mut blake3::Hasher, path: &Path) -> Result<()> {
    let mut hash = || -> io::Result<()> {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let len = file.read(&mut buffer)?;
            if len == 0 {
                return Ok(());
            }
            hasher.update(&buffer[..len]);
        }
    };
    hash().map_err(|e| Error::from(e).in_file(path))
}

/// Where a link leads, so that what it names is replaced and not the link; any other path as it is.
fn resolved(path: &Path) -> PathBuf {
    if path.is_symlink() { path.canonicalize().unwrap_or_else(|_| path.to_owned()) } else { path.to_owned() }
}

/// The system of another machine that shares the folder has process ids of its own: what it writes is younger.
const LEFT_BEHIND: Duration = Duration::from_secs(600);

/// Removes what killed processes left of earlier attempts at `path`.
fn remove_leftovers(path: &Path) {
    let Some(name) = path.file_name().map(|name| format!(".{}.", name.to_string_lossy())) else { return };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let id = found.to_str().and_then(|found| found.strip_prefix(&name)?.strip_suffix(".tmp"));
        let written = entry.metadata().and_then(|found| found.modified()).ok();
        let is_old = written.and_then(|time| time.elapsed().ok()).is_some_and(|age| age >= LEFT_BEHIND);
        if is_old && id.and_then(|id| id.parse().ok()).is_some_and(is_gone) {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// Whether no process has this id, as far as the system tells.
fn is_gone(id: u32) -> bool {
    let processes = Path::new("/proc");
    processes.join("self").exists() && !processes.join(id.to_string()).exists()
}

/// The temporary sibling of `path`: `.<name>.<pid>.tmp`.
fn sibling(path: &Path, suffix: &str) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Error::new(Kind::NotAFile).in_file(path))?;
    let name = format!(".{}.{}.{suffix}", name.to_string_lossy(), std::process::id());
    Ok(path.with_file_name(name))
}

/// Makes a rename durable. Not every file system lets a folder be synced; the rename itself is done.
fn sync_parent(path: &Path) {
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty())
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
}

/// A file that appears under its name only when it is complete.
///
/// Bytes go to a temporary sibling; [`AtomicFile::commit`] syncs and renames it, and dropping it
/// without that removes it.
#[derive(Debug)]
pub struct AtomicFile {
    /// `None` once sealed.
    file: Option<BufWriter<File>>,
    temporary: PathBuf,
    path: PathBuf,
    len: u64,
}

impl AtomicFile {
    /// Starts to write `path`.
    ///
    /// A link is followed; what killed processes left of earlier attempts is removed.
    ///
    /// # Errors
    /// The folder is missing or read-only, or something else than a file is there.
    pub fn create(path: &Path) -> Result<AtomicFile> {
        let path = &resolved(path);
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(Error::new(Kind::NotAFile).in_file(path));
        }
        let temporary = sibling(path, "tmp")?;
        remove_leftovers(path);
        let create = || File::options().write(true).create_new(true).open(&temporary);
        let file = match create() {
            // Only a killed process whose id this one inherited can have left it.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&temporary).and_then(|()| create())
            }
            other => other,
        };
        let file = file.map_err(|e| Error::from(e).in_file(path))?;
        Ok(AtomicFile {
            file: Some(BufWriter::with_capacity(1 << 16, file)),
            temporary,
            path: path.to_owned(),
            len: 0,
        })
    }

    /// The final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes written so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_mut().expect("nobody writes to a sealed file");
        file.write_all(bytes).map_err(|e| Error::from(e).in_file(&self.path))?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Waits until what was written so far is on the disk, so that little is left to wait for at the end.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn sync(&mut self) -> Result<()> {
        let file = self.file.as_mut().expect("nobody writes to a sealed file");
        let sync = |file: &mut BufWriter<File>| file.flush().and_then(|()| file.get_ref().sync_data());
        sync(file).map_err(|e| Error::from(e).in_file(&self.path))
    }

    /// Replaces bytes that were written before, from byte `offset` on.
    ///
    /// # Errors
    /// The disk is full or fails.
    ///
    /// # Panics
    /// They reach past what was written.
    pub fn rewrite(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        assert!(offset + bytes.len() as u64 <= self.len, "bytes that were not written yet");
        let file = self.file.as_mut().expect("the file is there until `commit` consumes it");
        let mut rewrite = || -> io::Result<()> {
            file.seek(SeekFrom::Start(offset))?;
            file.write_all(bytes)?;
            file.seek(SeekFrom::End(0)).map(drop)
        };
        rewrite().map_err(|e| Error::from(e).in_file(&self.path))
    }

    /// Closes the file for good, complete on the disk, until [`AtomicFile::commit_all`] names it; it then
    /// holds no descriptor of the system.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub(crate) fn seal(&mut self) -> Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        file.flush().and_then(|()| file.get_ref().sync_all()).map_err(|e| Error::from(e).in_file(&self.path))
    }

    /// Makes the file appear under its name, replacing an older one.
    ///
    /// # Errors
    /// The disk is full or fails; the older file is then still there.
    pub fn commit(self) -> Result<()> {
        AtomicFile::commit_all(vec![self])
    }

    /// Makes several files appear under their names: all, or none of them.
    ///
    /// Every file is complete on the disk before the first gets its name.
    ///
    /// # Errors
    /// The disk is full or fails; no older file has then been replaced, unless a rename itself failed after
    /// others had succeeded.
    pub fn commit_all(mut files: Vec<AtomicFile>) -> Result<()> {
        for file in &mut files {
            file.seal()?;
        }
        for (i, this) in files.iter().enumerate() {
            if let Err(e) = fs::rename(&this.temporary, &this.path) {
                for earlier in &files[..i] {
                    let _ = fs::remove_file(&earlier.path);
                }
                return Err(Error::from(e).in_file(&this.path));
            }
        }
        if let Some(this) = files.first() {
            sync_parent(&this.path);
        }
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // After a commit the temporary name is gone and this does nothing.
        drop(self.file.take());
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Writes a whole file at once; see [`AtomicFile`].
///
/// # Errors
/// The folder is missing or read-only, or the disk is full or fails.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write(bytes)?;
    file.commit()
}

/// A folder that appears under its name only when it is complete.
#[derive(Debug)]
pub struct AtomicDir {
    temporary: PathBuf,
    path: PathBuf,
}

impl AtomicDir {
    /// Starts to fill the folder `path`; write into [`AtomicDir::staging`].
    ///
    /// A link is followed; what killed processes left of earlier attempts is removed.
    ///
    /// # Errors
    /// The parent folder is missing or read-only.
    pub fn create(path: &Path) -> Result<AtomicDir> {
        let path = &resolved(path);
        let temporary = sibling(path, "tmp")?;
        remove_leftovers(path);
        let create = || -> io::Result<()> {
            match fs::create_dir(&temporary) {
                // Only a killed process whose id this one inherited can have left it.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_dir_all(&temporary)?;
                    fs::create_dir(&temporary)
                }
                other => other,
            }
        };
        create().map_err(|e| Error::from(e).in_file(path))?;
        Ok(AtomicDir { temporary, path: path.to_owned() })
    }

    /// The folder to write into until the commit.
    pub fn staging(&self) -> &Path {
        &self.temporary
    }

    /// Makes the folder appear under its name. An older one is moved away first and removed last, so a
    /// kill in between can leave neither name, but never a folder that is half written.
    ///
    /// # Errors
    /// A rename fails; an older folder is then put back.
    pub fn commit(self) -> Result<()> {
        let old = sibling(&self.path, "old")?;
        let commit = || -> io::Result<()> {
            if self.path.is_dir() {
                fs::rename(&self.path, &old)?;
            }
            fs::rename(&self.temporary, &self.path).inspect_err(|_| {
                let _ = fs::rename(&old, &self.path);
            })
        };
        commit().map_err(|e| Error::from(e).in_file(&self.path))?;
        sync_parent(&self.path);
        let _ = fs::remove_dir_all(&old);
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_link_is_followed_and_what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, b"old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_atomic(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"new");
        for other in [Path::new("/dev/null"), dir.path()] {
            let e = write_atomic(other, b"new").unwrap_err().to_string();
            assert!(e.contains(&*other.to_string_lossy()), "{e}");
            assert!(!fs::metadata(other).unwrap().is_file());
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_killed_processes_left_goes_with_the_next_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        // No process has the largest id; the first process is always there.
        let names = [
            ".out.4294967295.tmp",
            ".out.1.tmp",
            ".other.4294967295.tmp",
            ".out.x.tmp",
            ".out.4294967294.tmp",
        ];
        for name in names {
            let file = File::create(dir.path().join(name)).unwrap();
            let age = if name.contains("294.") { Duration::ZERO } else { 2 * LEFT_BEHIND };
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        }
        write_atomic(&path, b"new").unwrap();
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".other.4294967295.tmp", ".out.1.tmp", ".out.4294967294.tmp", ".out.x.tmp", "out"]);
    }
}
