//! The record with the largest timestamp (KIP-734).

use crate::{
    batch::Batch,
    error::ReadError,
    host::Host,
    log::LogState,
    shard::{
        Shard,
        read::{Decompress, FoundTime, each_record},
    },
    types::PartitionKey,
};

impl<H: Host> Shard<H> {
    /// The first of the records with the largest timestamp among those that are left; `None` if no record has a time. As Kafka's it may
    /// be one that consumers do not see yet.
    ///
    /// # Errors
    /// As [`find_time`](Self::find_time).
    pub async fn find_newest(
        &self,
        key: PartitionKey,
        decompress: Decompress<'_>,
    ) -> Result<Option<FoundTime>, ReadError> {
        let partition = self.partition(&key).ok_or(ReadError::UnknownPartition(key))?;
        let (log_start, segments) = partition.with_state(|s| (s.log_start(), s.segments().to_vec()));
        let Some(newest) = segments.iter().map(|s| s.max_timestamp).max().filter(|t| *t >= 0) else {
            return Ok(None);
        };
        let found = self.find_time_below(key, newest, LogState::log_end, decompress).await?;
        let Some(first) = segments.first().filter(|s| found.is_none() && s.base < log_start) else {
            return Ok(found);
        };
        // That record was deleted. Only the first segment lacks records: what is left of it is looked through.
        let mut newest = segments[1..].iter().map(|s| s.max_timestamp).max().unwrap_or(i64::MIN);
        let mut read = Ok(());
        let mut look = |batch: &Batch| {
            if batch.header.segment_base != first.base {
                return false;
            }
            if batch.header.max_timestamp > newest {
                read = each_record(batch, log_start, decompress, |record| {
                    newest = newest.max(record.timestamp);
                    true
                });
            }
            read.is_ok()
        };
        self.visit_below(key, log_start, LogState::log_end, &|_| true, &mut look)
            .await?;
        read.map_err(ReadError::Batch)?;
        if newest < 0 {
            return Ok(None);
        }
        self.find_time_below(key, newest, LogState::log_end, decompress).await
    }
}
