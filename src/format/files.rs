//! The files of a checkpoint as one set of named tensors.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::ggml::{self, GgmlType};
use super::gguf::{self, Metadata};
use super::reader::{ReadAt, Reader};
use super::safetensors::{self, LENGTH_BYTES, UniqueMap};
use super::{Bytes, Dtype, TensorInfo, TensorView, quoted, shortened};
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The longest side file (configuration, tokenizer, index) that is read into memory.
const MAX_FILE_BYTES: u64 = 1 << 28;

/// Bytes of a GGUF file that is not mapped which are read to find out how long its header is: that of a
/// model without a vocabulary is shorter.
const FIRST_HEADER_BYTES: u64 = 1 << 18;

/// The files of a checkpoint: a directory, a GGUF file, parts of the program, or whatever can be read.
///
/// Opening reads and checks the headers only. A tensor's bytes are mapped (or read) when it is asked
/// for and leave memory when its view is dropped.
#[derive(Debug)]
pub struct ModelFiles {
    label: String,
    source: Source,
    shards: Vec<Arc<Shard>>,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: Option<Metadata>,
}

#[derive(Debug)]
enum Source {
    Directory(PathBuf),
    /// GGUF files in this directory, whose other files have nothing to do with them.
    GgufOnly(PathBuf),
    /// Whole files by name.
    Memory(Vec<(String, Bytes)>),
    /// Files by name, in pieces.
    Readers(Vec<(String, Reader)>),
}

/// One safetensors or GGUF file.
#[derive(Debug)]
struct Shard {
    /// For messages.
    label: String,
    data: ShardData,
}

#[derive(Debug)]
enum ShardData {
    File { path: PathBuf, file: File },
    Memory(Bytes),
    Reader(Reader),
}

/// `model.safetensors.index.json`; `metadata` is of no use here.
#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl ModelFiles {
    /// Opens what `path` is:
    ///
    /// - a directory with `model.safetensors.index.json` and its shards, or else with
    ///   `model.safetensors`;
    /// - a directory without those, but with one GGUF model;
    /// - a GGUF file. The files beside it are not looked at, except for the other parts of a split
    ///   model (`…-00001-of-0000N.gguf`), which any of its parts opens.
    ///
    /// # Errors
    /// If it is none of these, a directory holds several GGUF models, a file cannot be read, a
    /// header does not describe its file, two files hold the same tensor, the index names a file
    /// outside the directory or a tensor that its shard lacks, or the parts of a split model are
    /// not all there.
    pub fn open(path: &Path) -> Result<Self> {
        let io_error = |source| Error::Io { path: path.to_owned(), source };
        let label = path.display().to_string();
        if std::fs::metadata(path).map_err(io_error)?.is_dir() {
            return Self::load(label, Source::Directory(path.to_owned()));
        }
        let (Some(name), true) = (path.file_name(), is_gguf(path)?) else {
            let reason = "not a directory and not a GGUF file";
            return Err(io_error(io::Error::new(io::ErrorKind::NotADirectory, reason)));
        };
        let directory = path.parent().unwrap_or(Path::new("")).to_owned();
        let mut files = Self::empty(label, Source::GgufOnly(directory));
        files.add_gguf(name)?;
        Ok(files)
    }

    /// The same as for a directory, for files `(name, bytes)` that are part of the program; `label`
    /// stands for the directory in messages.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn embedded(label: &str, files: &'static [(&'static str, &'static [u8])]) -> Result<Self> {
        let files = files.iter().map(|&(name, bytes)| (name.to_owned(), Bytes::Static(bytes)));
        Self::load(label.to_owned(), Source::Memory(files.collect()))
    }

    /// The same for files `(name, bytes)` that have been read or made.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn in_memory(
        label: &str,
        files: impl IntoIterator<Item = (String, Vec<u8>)>,
    ) -> Result<Self> {
        let owned = |(name, bytes): (String, Vec<u8>)| (name, Bytes::Owned(bytes.into()));
        Self::load(label.to_owned(), Source::Memory(files.into_iter().map(owned).collect()))
    }

    /// The same for files `(name, reader)` that are read in pieces: no more of them stands in memory than
    /// who loads a model needs at a time.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn from_readers(
        label: &str,
        files: impl IntoIterator<Item = (String, Arc<dyn ReadAt>)>,
    ) -> Result<Self> {
        let files = files.into_iter().map(|(name, reader)| (name, Reader(reader)));
        Self::load(label.to_owned(), Source::Readers(files.collect()))
    }

    fn empty(label: String, source: Source) -> Self {
        Self { label, source, shards: Vec::new(), tensors: BTreeMap::new(), metadata: None }
    }

    fn load(label: String, source: Source) -> Result<Self> {
        let mut files = Self::empty(label, source);
        if let Some(json) = files.file(INDEX)? {
            files.add_indexed(&json)?;
        } else if let Some(shard) = files.open_shard(SINGLE)? {
            files.add_safetensors(shard)?;
        } else {
            files.add_gguf(&files.only_gguf()?)?;
        }
        Ok(files)
    }

    /// The name of the one GGUF file; of the first part if that is a split model.
    fn only_gguf(&self) -> Result<OsString> {
        let mut names = BTreeSet::new();
        for name in self.names()?.into_iter().filter(|name| has_gguf_extension(Path::new(name))) {
            let part = name.to_str().and_then(SplitName::parse);
            names.insert(part.map(|part| part.name(1).into()).unwrap_or(name));
        }
        let names: Vec<OsString> = names.into_iter().collect();
        match names.len() {
            0 => Err(Error::NotACheckpoint {
                path: self.label.clone().into(),
                expected: "model.safetensors, model.safetensors.index.json or GGUF file",
            }),
            1 => Ok(names[0].clone()),
            count => {
                let shown: Vec<String> =
                    names.iter().take(3).map(|name| shortened(&name.to_string_lossy())).collect();
                let rest = if count > shown.len() { ", …" } else { "" };
                Err(Error::SeveralModels {
                    path: self.label.clone().into(),
                    found: format!("{count} GGUF models ({}{rest})", shown.join(", ")),
                })
            }
        }
    }

    /// The names of all files.
    fn names(&self) -> Result<Vec<OsString>> {
        match &self.source {
            Source::Memory(files) => Ok(files.iter().map(|(name, _)| name.into()).collect()),
            Source::Readers(files) => Ok(files.iter().map(|(name, _)| name.into()).collect()),
            Source::Directory(directory) | Source::GgufOnly(directory) => {
                let names = std::fs::read_dir(directory)
                    .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect());
                names.map_err(|source| Error::Io { path: directory.clone(), source })
            }
        }
    }

    /// Adds every shard that the index names, then checks that each tensor is where it says. A
    /// tensor of a shard that the index leaves out counts all the same, as in the original
    /// implementation.
    fn add_indexed(&mut self, json: &[u8]) -> Result<()> {
        let file = self.join(INDEX);
        let index: Index = serde_json::from_slice(json)
            .map_err(|source| Error::Json { file: file.clone(), source })?;
        let weight_map = index.weight_map.0;
        let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, name) in &weight_map {
            if shards.contains_key(name.as_str()) {
                continue;
            }
            if !is_plain_file_name(name) {
                return Err(Error::ShardName { file, found: quoted(name) });
            }
            let shard = self.open_shard(name)?.ok_or_else(|| Error::Io {
                path: self.join(name).into(),
                source: io::ErrorKind::NotFound.into(),
            })?;
            shards.insert(name, self.shards.len());
            self.add_safetensors(shard)?;
        }
        for (tensor, name) in &weight_map {
            let shard = shards[name.as_str()];
            if self.tensors.get(tensor).is_none_or(|info| info.shard != shard) {
                return Err(Error::MissingTensor {
                    file: self.join(name),
                    tensor: quoted(tensor),
                    hint: Some("model.safetensors.index.json says it is in this file"),
                });
            }
        }
        Ok(())
    }

    /// Reads and checks the header of a safetensors file.
    fn add_safetensors(&mut self, shard: Shard) -> Result<()> {
        let file_len = shard.len()?;
        if file_len < LENGTH_BYTES as u64 {
            let problem = format!("a file of {file_len} bytes, too short for a header");
            return Err(Error::Safetensors { file: shard.label, problem });
        }
        let mut start = [0; LENGTH_BYTES];
        start.copy_from_slice(&shard.slice(0, LENGTH_BYTES)?);
        let header_len = safetensors::header_len(&shard.label, start, file_len)?;
        let json = shard.slice(LENGTH_BYTES as u64, header_len)?;
        let tensors = safetensors::parse(&shard.label, &json, file_len, self.shards.len())?;
        self.add(shard, tensors)
    }

    /// Adds the GGUF file of that name, and the other parts if it is split.
    fn add_gguf(&mut self, name: &OsStr) -> Result<()> {
        let (shard, header) = self.open_gguf(name)?;
        let split = Split::of(&header.metadata)?;
        let parts = name.to_str().and_then(SplitName::parse);
        let named_count = parts.as_ref().map_or(1, |parts| parts.count);
        let Some(parts) = parts.filter(|_| split.count > 1) else {
            if split.count.max(1) != named_count {
                return Err(Error::GgufSplit {
                    file: shard.label,
                    expected: "a name that ends in -0000N-of-0000M.gguf with M as split.count"
                        .to_owned(),
                    found: format!("split.count {}", split.count),
                });
            }
            self.metadata = Some(header.metadata);
            return self.add(shard, header.tensors);
        };
        drop(header);
        for no in 1..=parts.count {
            let (shard, header) = self.open_gguf(OsStr::new(&parts.name(no)))?;
            Split::of(&header.metadata)?.check(
                &shard.label,
                Split { no: no - 1, count: parts.count, tensors: split.tensors },
            )?;
            self.metadata.get_or_insert(header.metadata);
            self.add(shard, header.tensors)?;
        }
        if self.tensors.len() as u64 != split.tensors {
            return Err(Error::GgufSplit {
                file: self.label.clone(),
                expected: format!("{} tensors (split.tensors.count)", split.tensors),
                found: format!("{} in its {} parts", self.tensors.len(), split.count),
            });
        }
        Ok(())
    }

    fn open_gguf(&self, name: &OsStr) -> Result<(Shard, gguf::Header)> {
        let shard = self.open_shard(name)?.ok_or_else(|| Error::Io {
            path: self.join(name).into(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        let file_len = shard.len()?;
        // How long the header is shows only in reading it. Pages that are not read cost nothing, bytes
        // of a reader do.
        let most = file_len.min(gguf::MAX_HEADER_BYTES);
        let mut len = if shard.is_in_place() { most } else { most.min(FIRST_HEADER_BYTES) };
        loop {
            let start = shard.slice(0, len as usize)?;
            if let Some(header) = gguf::parse(&shard.label, &start, file_len, self.shards.len())? {
                return Ok((shard, header));
            }
            len = (4 * len).min(most);
        }
    }

    fn add(&mut self, shard: Shard, tensors: Vec<TensorInfo>) -> Result<()> {
        for info in tensors {
            match self.tensors.entry(info.name.clone()) {
                Entry::Vacant(place) => {
                    place.insert(info);
                }
                Entry::Occupied(first) => {
                    return Err(Error::DuplicateTensor {
                        file: shard.label,
                        tensor: quoted(&info.name),
                        other: self.shards[first.get().shard].label.clone(),
                    });
                }
            }
        }
        self.shards.push(Arc::new(shard));
        Ok(())
    }

    fn open_shard(&self, name: impl AsRef<Path>) -> Result<Option<Shard>> {
        let name = name.as_ref();
        let label = self.join(name);
        let data = match &self.source {
            Source::Memory(files) => match named(files, name) {
                Some(bytes) => ShardData::Memory(bytes.clone()),
                None => return Ok(None),
            },
            Source::Readers(files) => match named(files, name) {
                Some(reader) => ShardData::Reader(reader.clone()),
                None => return Ok(None),
            },
            Source::Directory(directory) | Source::GgufOnly(directory) => {
                let path = directory.join(name);
                match open_regular(&path)? {
                    Some(file) => ShardData::File { path, file },
                    None => return Ok(None),
                }
            }
        };
        Ok(Some(Shard { label, data }))
    }

    /// The whole of a side file such as `config.json`; `None` if there is no such file, or if a
    /// GGUF file was opened rather than its directory.
    ///
    /// # Errors
    /// If it cannot be read or is larger than 256 MiB.
    pub fn file(&self, name: &str) -> Result<Option<Bytes>> {
        let directory = match &self.source {
            Source::Memory(files) => return Ok(named(files, Path::new(name)).cloned()),
            Source::Readers(files) => {
                return named(files, Path::new(name)).map(|file| self.read(name, file)).transpose();
            }
            Source::GgufOnly(_) => return Ok(None),
            Source::Directory(directory) => directory,
        };
        let path = directory.join(name);
        let Some(file) = open_regular(&path)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        let read = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes);
        match read {
            Ok(len) if len as u64 <= MAX_FILE_BYTES => Ok(Some(Bytes::Owned(bytes.into()))),
            Ok(_) => Err(Error::Io { path, source: io::ErrorKind::FileTooLarge.into() }),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    /// The whole of a side file.
    fn read(&self, name: &str, file: &Reader) -> Result<Bytes> {
        let bytes = file.len().and_then(|len| match len {
            0..=MAX_FILE_BYTES => file.read(0, len as usize),
            _ => Err(io::ErrorKind::FileTooLarge.into()),
        });
        bytes.map_err(|source| Error::Io { path: self.join(name).into(), source })
    }

    /// The directory or GGUF file, or the label of files that are elsewhere: for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// How messages name the file `name` of this set.
    pub fn join(&self, name: impl AsRef<Path>) -> String {
        let directory = match &self.source {
            Source::GgufOnly(directory) => directory,
            Source::Directory(_) | Source::Memory(_) | Source::Readers(_) => Path::new(&self.label),
        };
        directory.join(name).display().to_string()
    }

    /// The key–value pairs of a GGUF model (of its first part if it is split); `None` for
    /// safetensors.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// The names of all tensors, in alphabetical order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What the headers say of all tensors, in alphabetical order.
    pub fn infos(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// What the header says of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The file (or shard) a tensor is in, for messages.
    pub fn file_of(&self, info: &TensorInfo) -> &str {
        self.shards.get(info.shard).map_or(&self.label, |shard| &shard.label)
    }

    /// A tensor, mapped or read; `None` if there is none of that name.
    ///
    /// # Errors
    /// If its type is not a [`Dtype`], or its bytes cannot be had.
    pub fn tensor(&self, name: &str) -> Result<Option<TensorView>> {
        let Some(info) = self.info(name) else {
            return Ok(None);
        };
        let dtype = self.dtype(info)?;
        let len = info.len_bytes as usize;
        let bytes = self.slice(info, 0..len)?;
        let file = self.file_of(info).to_owned();
        Ok(Some(TensorView {
            file,
            name: info.name.clone(),
            dtype,
            shape: info.shape.clone(),
            bytes,
        }))
    }

    /// A tensor's element type.
    ///
    /// # Errors
    /// If it is not a [`Dtype`].
    pub fn dtype(&self, info: &TensorInfo) -> Result<Dtype> {
        Dtype::from_name(&info.dtype).ok_or_else(|| Error::TensorDtype {
            file: self.file_of(info).to_owned(),
            tensor: info.name.clone(),
            expected: "U8, BF16, F16 or F32",
            found: quoted(&info.dtype),
        })
    }

    /// The element type of a tensor in a GGUF file.
    ///
    /// # Errors
    /// If this version does not read it; says what would help.
    pub fn ggml_type(&self, info: &TensorInfo) -> Result<GgmlType> {
        GgmlType::from_name(&info.dtype).ok_or_else(|| Error::GgmlType {
            file: self.file_of(info).to_owned(),
            tensor: quoted(&info.name),
            found: shortened(&info.dtype).escape_debug().to_string(),
            remedy: ggml::remedy(&info.dtype),
        })
    }

    /// What changes when the files do: length and time of last change of each file of tensors. `None` for
    /// files in memory and readers.
    ///
    /// # Errors
    /// [`Error::Io`] if the system does not tell.
    pub fn stamp(&self) -> Result<Option<Vec<u8>>> {
        let mut stamp = Vec::new();
        for shard in &self.shards {
            let ShardData::File { path, file } = &shard.data else { return Ok(None) };
            let times = file.metadata().and_then(|data| Ok((data.len(), data.modified()?)));
            let (len, time) = times.map_err(|source| Error::Io { path: path.clone(), source })?;
            let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            stamp.extend(len.to_le_bytes());
            stamp.extend(since.as_nanos().to_le_bytes());
        }
        Ok(Some(stamp))
    }

    /// A tensor by itself, to be read when it is needed.
    ///
    /// # Panics
    /// If `info` is of another set of files.
    pub fn stored(&self, info: &TensorInfo) -> StoredTensor {
        StoredTensor { shard: self.shards[info.shard].clone(), info: info.clone() }
    }

    /// Part of a tensor's bytes, mapped or read: for reading a large one piece by piece.
    ///
    /// # Errors
    /// If they cannot be mapped or read.
    ///
    /// # Panics
    /// If the range is not inside the tensor, or `info` is of another set of files.
    pub fn slice(&self, info: &TensorInfo, range: Range<usize>) -> Result<Bytes> {
        assert!(range.start <= range.end && range.end as u64 <= info.len_bytes);
        self.shards[info.shard].slice(info.offset + range.start as u64, range.len())
    }
}

/// A tensor in its file.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    shard: Arc<Shard>,
    info: TensorInfo,
}

impl StoredTensor {
    /// What the header says of it.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// The file (or shard) it is in, for messages.
    pub fn file(&self) -> &str {
        &self.shard.label
    }

    /// Whether its bytes are mapped or in memory, so that all of them may be asked for at once, and by
    /// several threads.
    pub fn is_in_place(&self) -> bool {
        self.shard.is_in_place()
    }

    /// Part of its bytes, mapped or read.
    ///
    /// # Errors
    /// If they cannot be mapped or read.
    ///
    /// # Panics
    /// If the range is not inside the tensor.
    pub fn slice(&self, range: Range<usize>) -> Result<Bytes> {
        assert!(range.start <= range.end && range.end as u64 <= self.info.len_bytes);
        self.shard.slice(self.info.offset + range.start as u64, range.len())
    }
}

impl Shard {
    fn is_in_place(&self) -> bool {
        !matches!(self.data, ShardData::Reader(_))
    }

    fn len(&self) -> Result<u64> {
        match &self.data {
            ShardData::Memory(bytes) => Ok(bytes.len() as u64),
            ShardData::Reader(reader) => reader.len().map_err(|source| self.io_error(source)),
            ShardData::File { path, file } => match file.metadata() {
                Ok(metadata) => Ok(metadata.len()),
                Err(source) => Err(Error::Io { path: path.clone(), source }),
            },
        }
    }

    /// `len` bytes at `offset`, which the header has placed inside the file.
    fn slice(&self, offset: u64, len: usize) -> Result<Bytes> {
        match &self.data {
            _ if len == 0 => Ok(Bytes::Static(&[])),
            ShardData::Memory(bytes) => Ok(bytes.part(offset as usize, len)),
            ShardData::File { path, file } => Bytes::map(file, offset, len)
                .map_err(|source| Error::Io { path: path.clone(), source }),
            ShardData::Reader(reader) => {
                reader.read(offset, len).map_err(|source| self.io_error(source))
            }
        }
    }

    fn io_error(&self, source: io::Error) -> Error {
        Error::Io { path: self.label.clone().into(), source }
    }
}

/// What a part of a split GGUF model says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Split {
    /// From 0.
    no: u64,
    /// 0 where a merged model kept the key.
    count: u64,
    /// In all parts.
    tensors: u64,
}

impl Split {
    fn of(metadata: &Metadata) -> Result<Self> {
        let count = metadata.get("split.count")?.unwrap_or(0);
        if count <= 1 {
            return Ok(Self { no: 0, count, tensors: 0 });
        }
        let (no, tensors) =
            (metadata.require("split.no")?, metadata.require("split.tensors.count")?);
        Ok(Self { no, count, tensors })
    }

    fn check(&self, file: &str, expected: Self) -> Result<()> {
        if *self == expected {
            return Ok(());
        }
        let shown = |split: &Self| {
            let Self { no, count, tensors } = split;
            format!("split.no {no}, split.count {count}, split.tensors.count {tensors}")
        };
        let (expected, found) = (shown(&expected), shown(self));
        Err(Error::GgufSplit { file: file.to_owned(), expected, found })
    }
}

/// The name of a part of a split GGUF model: `{stem}-00001-of-00003.gguf`.
struct SplitName<'a> {
    stem: &'a str,
    count: u64,
}

impl<'a> SplitName<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let number = |text: &str| -> Option<u64> {
            let digits = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
            if digits { text.parse().ok() } else { None }
        };
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, no) = rest.rsplit_once('-')?;
        let (no, count) = (number(no)?, number(count)?);
        if (1..=count).contains(&no) { Some(Self { stem, count }) } else { None }
    }

    /// The name of part `no`, counted from 1.
    fn name(&self, no: u64) -> String {
        format!("{}-{no:05}-of-{:05}.gguf", self.stem, self.count)
    }
}

fn named<'a, T>(files: &'a [(String, T)], name: &Path) -> Option<&'a T> {
    files.iter().find(|(file, _)| Path::new(file) == name).map(|(_, file)| file)
}

fn has_gguf_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Whether a file is called a GGUF file, or begins like one: caches name files by their hash.
fn is_gguf(path: &Path) -> Result<bool> {
    let Some(mut file) = open_regular(path)? else {
        return Ok(false);
    };
    if has_gguf_extension(path) {
        return Ok(true);
    }
    let mut start = [0; gguf::MAGIC.len()];
    match file.read_exact(&mut start) {
        Ok(()) => Ok(start == gguf::MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(source) => Err(Error::Io { path: path.to_owned(), source }),
    }
}

/// Opens a regular file or a link to one; `None` if it does not exist. Anything else (opening a
/// pipe would wait for a writer) is an error.
fn open_regular(path: &Path) -> Result<Option<File>> {
    let io_error = |source| Error::Io { path: path.to_owned(), source };
    match std::fs::metadata(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(io_error(source)),
        Ok(metadata) if metadata.is_file() => File::open(path).map(Some).map_err(io_error),
        Ok(_) => Err(io_error(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))),
    }
}

/// Whether `name` is a file name and nothing else on every system: no directory, drive or parent.
/// Nor a name that no message can hold: of more bytes than file systems allow, or of several lines.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && name.len() <= 255
        && !name.contains(['/', '\\', ':'])
        && !name.contains(char::is_control)
}
