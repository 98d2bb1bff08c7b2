//! `millrace export`: saves what can be read of a stopped broker's folder as Kafka log files, one folder per partition, as
//! a Kafka broker keeps them: `NAME-PARTITION/FIRST OFFSET.log`, record batches one after the other. Kafka's own tools read
//! them, and a Kafka broker takes such folders up.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use glommio::{LocalExecutorBuilder, Placement};
use millrace_cluster::{metadata::MetadataRecord, raft};
use millrace_engine::{
    PartitionKey, StorageError,
    batch::{Batch, PayloadFormat},
    disk::glommio::GlommioHost,
    salvage::{Damage, Salvage},
};
use thiserror::Error;
use uuid::Uuid;

use crate::{
    cpus,
    identity::{self, IdentityError},
    node::METADATA_KEY,
    server,
};

/// Bytes of one file, as Kafka's default.
const FILE_BYTES: u64 = 1 << 30;

/// Why an export ended early.
#[derive(Debug, Error)]
pub enum ExportError {
    /// Not a data folder, or a broker runs on it.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The data folder cannot be read.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The target cannot be written.
    #[error("{path}: {source}", path = path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Exports are not mixed.
    #[error("{path} is there already; give a new folder with --to", path = path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// No topic of that name was found.
    #[error("no topic {name} was found; found: {found}")]
    UnknownTopic {
        /// As asked for.
        name: String,
        /// Names that are there.
        found: String,
    },
    /// A thread or the ring.
    #[error("{0}")]
    Executor(String),
}

/// What was written.
#[derive(Debug, Default)]
pub struct Exported {
    /// Partition folder, first offset, offset behind the last, records.
    pub partitions: Vec<(String, i64, i64, u64)>,
    /// What could not be read.
    pub damage: Vec<Damage>,
}

/// Exports a folder, or one topic of it, to a new folder.
///
/// # Errors
/// [`ExportError`]; damage of the data is none, it is told in the result.
pub fn export(data_dir: &Path, to: &Path, topic: Option<String>) -> Result<Exported, ExportError> {
    let _lock = identity::lock(data_dir)?;
    if to.exists() {
        return Err(ExportError::Exists { path: to.to_owned() });
    }
    let (dir, to) = (data_dir.to_owned(), to.to_owned());
    LocalExecutorBuilder::new(Placement::Unbound)
        .name("export")
        .io_memory(1 << 20)
        .spawn(move || async move {
            let host = server::new_host(&dir, &cpus::allowed())
                .await
                .map_err(|e| ExportError::Executor(e.to_string()))?;
            run(host, &dir, &to, topic).await
        })
        .map_err(|e| ExportError::Executor(e.to_string()))?
        .join()
        .map_err(|e| ExportError::Executor(e.to_string()))?
}

async fn run(host: GlommioHost, dir: &Path, to: &Path, only: Option<String>) -> Result<Exported, ExportError> {
    let salvage = Salvage::open(host, dir).await?;
    let mut out = Exported {
        damage: salvage.damage().to_vec(),
        ..Exported::default()
    };
    let names = topic_names(&salvage, &mut out.damage).await?;
    let name_of = |key: &PartitionKey| names.get(&key.topic).cloned().unwrap_or(key.topic.simple().to_string());
    if let Some(name) = &only
        && !salvage.partitions().any(|key| name_of(&key) == *name)
    {
        return Err(ExportError::UnknownTopic {
            name: name.clone(),
            found: names.into_values().collect::<Vec<_>>().join(", "),
        });
    }
    for key in salvage.partitions().filter(|key| *key != METADATA_KEY) {
        let name = name_of(&key);
        if only.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        let folder = format!("{name}-{}", key.partition);
        let mut files = Files::new(to.join(&folder))?;
        out.damage.extend(salvage.visit(key, |batch| files.write(batch)).await?);
        let (from, until, records) = files.finish()?;
        out.partitions.push((folder, from, until, records));
    }
    Ok(out)
}

/// Names by id, from the metadata log.
async fn topic_names(
    salvage: &Salvage<GlommioHost>,
    damage: &mut Vec<Damage>,
) -> Result<BTreeMap<Uuid, String>, StorageError> {
    let mut names = BTreeMap::new();
    let found = salvage
        .visit::<StorageError>(METADATA_KEY, |batch| {
            if batch.header.format == PayloadFormat::Metadata
                && let Ok(records) = raft::records_in(&batch.payload)
            {
                for record in records {
                    if let MetadataRecord::Topic { id, name } = record {
                        names.insert(Uuid::from_bytes(id), name);
                    }
                }
            }
            Ok(())
        })
        .await?;
    damage.extend(found);
    Ok(names)
}

/// The files of one partition.
struct Files {
    dir: PathBuf,
    open: Option<(BufWriter<File>, PathBuf, u64)>,
    from: Option<i64>,
    until: i64,
    records: u64,
}

impl Files {
    fn new(dir: PathBuf) -> Result<Self, ExportError> {
        fs::create_dir_all(&dir).map_err(failed(&dir))?;
        Ok(Self {
            dir,
            open: None,
            from: None,
            until: 0,
            records: 0,
        })
    }

    fn write(&mut self, batch: &Batch) -> Result<(), ExportError> {
        let mut bytes = Vec::with_capacity(batch.payload.len());
        batch.write_served(&mut bytes);
        if self.open.as_ref().is_none_or(|(_, _, written)| *written >= FILE_BYTES) {
            self.close()?;
            let path = self.dir.join(format!("{:020}.log", batch.header.base_offset));
            let file = File::create_new(&path).map_err(failed(&path))?;
            self.open = Some((BufWriter::with_capacity(1 << 20, file), path, 0));
        }
        if let Some((file, path, written)) = &mut self.open {
            file.write_all(&bytes).map_err(failed(path))?;
            *written += bytes.len() as u64;
        }
        self.from.get_or_insert(batch.header.base_offset);
        self.until = batch.header.last_offset + 1;
        self.records += u64::from(batch.header.record_count.max(0).cast_unsigned());
        Ok(())
    }

    fn close(&mut self) -> Result<(), ExportError> {
        if let Some((file, path, _)) = self.open.take() {
            let file = file.into_inner().map_err(|e| failed(&path)(e.into_error()))?;
            file.sync_all().map_err(failed(&path))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(i64, i64, u64), ExportError> {
        self.close()?;
        Ok((self.from.unwrap_or(0), self.until, self.records))
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ExportError + use<'_> {
    move |source| ExportError::Write {
        path: path.to_owned(),
        source,
    }
}
