//! The files of a checkpoint as one set of named tensors.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::safetensors::{self, LENGTH_BYTES, UniqueMap};
use super::{Bytes, Dtype, TensorInfo, TensorView, mapped, quoted};
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The longest side file (configuration, tokenizer, index) that is read into memory.
const MAX_FILE_BYTES: u64 = 1 << 28;

/// The files of a checkpoint: a directory, or parts of the program.
///
/// Opening reads and checks the safetensors headers only. A tensor's bytes are mapped when it is
/// asked for and leave memory when its view is dropped.
#[derive(Debug)]
pub struct ModelFiles {
    label: String,
    source: Source,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
}

#[derive(Debug)]
enum Source {
    Directory(PathBuf),
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// One safetensors file.
#[derive(Debug)]
struct Shard {
    /// For messages.
    label: String,
    data: ShardData,
}

#[derive(Debug)]
enum ShardData {
    File { path: PathBuf, file: File },
    Static(&'static [u8]),
}

/// `model.safetensors.index.json`; `metadata` is of no use here.
#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl ModelFiles {
    /// Opens a directory with `model.safetensors.index.json` and its shards, or else with
    /// `model.safetensors`.
    ///
    /// # Errors
    /// If there is neither, a file cannot be read, a header does not describe its file, two shards
    /// hold the same tensor, or the index names a file outside the directory or a tensor that its
    /// shard lacks.
    pub fn open(path: &Path) -> Result<Self> {
        let io_error = |source| Error::Io { path: path.to_owned(), source };
        if !std::fs::metadata(path).map_err(io_error)?.is_dir() {
            return Err(io_error(io::ErrorKind::NotADirectory.into()));
        }
        Self::load(path.display().to_string(), Source::Directory(path.to_owned()))
    }

    /// The same for files `(name, bytes)` that are part of the program; `label` stands for the
    /// directory in messages.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn embedded(label: &str, files: &'static [(&'static str, &'static [u8])]) -> Result<Self> {
        Self::load(label.to_owned(), Source::Embedded(files))
    }

    fn load(label: String, source: Source) -> Result<Self> {
        let mut files = Self { label, source, shards: Vec::new(), tensors: BTreeMap::new() };
        match files.file(INDEX)? {
            Some(json) => files.add_indexed(&json)?,
            None => {
                let Some(shard) = files.open_shard(SINGLE)? else {
                    return Err(Error::NotACheckpoint {
                        path: files.label.into(),
                        expected: "model.safetensors or model.safetensors.index.json",
                    });
                };
                files.add(shard)?;
            }
        }
        Ok(files)
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
            self.add(shard)?;
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

    /// Reads and checks a shard's header.
    fn add(&mut self, shard: Shard) -> Result<()> {
        let file_len = shard.len()?;
        if file_len < LENGTH_BYTES as u64 {
            let problem = format!("a file of {file_len} bytes, too short for a header");
            return Err(Error::Safetensors { file: shard.label, problem });
        }
        let mut start = [0; LENGTH_BYTES];
        start.copy_from_slice(&shard.slice(0, LENGTH_BYTES)?);
        let header_len = safetensors::header_len(&shard.label, start, file_len)?;
        let json = shard.slice(LENGTH_BYTES as u64, header_len)?;
        for info in safetensors::parse(&shard.label, &json, file_len, self.shards.len())? {
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
        self.shards.push(shard);
        Ok(())
    }

    fn open_shard(&self, name: &str) -> Result<Option<Shard>> {
        let label = self.join(name);
        let data = match &self.source {
            Source::Embedded(files) => match embedded(files, name) {
                Some(bytes) => ShardData::Static(bytes),
                None => return Ok(None),
            },
            Source::Directory(directory) => {
                let path = directory.join(name);
                match open_regular(&path)? {
                    Some(file) => ShardData::File { path, file },
                    None => return Ok(None),
                }
            }
        };
        Ok(Some(Shard { label, data }))
    }

    /// The whole of a side file such as `config.json`; `None` if there is no such file.
    ///
    /// # Errors
    /// If it cannot be read or is larger than 256 MiB.
    pub fn file(&self, name: &str) -> Result<Option<Bytes>> {
        let directory = match &self.source {
            Source::Embedded(files) => return Ok(embedded(files, name).map(Bytes::Static)),
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

    /// The directory, or the label of embedded files: for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// How messages name the file `name` of this set.
    pub fn join(&self, name: &str) -> String {
        Path::new(&self.label).join(name).display().to_string()
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

    /// A tensor, mapped; `None` if there is none of that name.
    ///
    /// # Errors
    /// If its type is not a [`Dtype`], or its bytes cannot be mapped.
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

    /// Part of a tensor's bytes, mapped: for reading a large one piece by piece.
    ///
    /// # Errors
    /// If they cannot be mapped.
    ///
    /// # Panics
    /// If the range is not inside the tensor, or `info` is of another set of files.
    pub fn slice(&self, info: &TensorInfo, range: Range<usize>) -> Result<Bytes> {
        assert!(range.start <= range.end && range.end as u64 <= info.len_bytes);
        self.shards[info.shard].slice(info.offset + range.start as u64, range.len())
    }
}

impl Shard {
    fn len(&self) -> Result<u64> {
        match &self.data {
            ShardData::Static(bytes) => Ok(bytes.len() as u64),
            ShardData::File { path, file } => match file.metadata() {
                Ok(metadata) => Ok(metadata.len()),
                Err(source) => Err(Error::Io { path: path.clone(), source }),
            },
        }
    }

    /// `len` bytes at `offset`, which the header has placed inside the file.
    fn slice(&self, offset: u64, len: usize) -> Result<Bytes> {
        match &self.data {
            // An empty map is an error on some systems.
            _ if len == 0 => Ok(Bytes::Static(&[])),
            ShardData::Static(bytes) => {
                let offset = offset as usize;
                Ok(Bytes::Static(&bytes[offset..offset + len]))
            }
            ShardData::File { path, file } => mapped::map(file, offset, len)
                .map(|map| Bytes::Mapped(Arc::new(map)))
                .map_err(|source| Error::Io { path: path.clone(), source }),
        }
    }
}

fn embedded(files: &'static [(&'static str, &'static [u8])], name: &str) -> Option<&'static [u8]> {
    files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes)
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
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
}
