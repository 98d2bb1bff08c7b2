//! The record with the largest timestamp (KIP-734).

use crate::{
    batch::Batch,
    error::ReadError,
    host::Host,
    log::LogState,
    shard::{
        Shard,
        read::{FoundTime, RecordTimes, each_record},
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
        times: &impl RecordTimes,
    ) -> Result<Option<FoundTime>, ReadError> {
        let partition = self.partition(&key).ok_or(ReadError::UnknownPartition(key))?;
        let (log_start, segments) = partition.with_state(|s| (s.log_start(), s.segments().to_vec()));
        let Some(newest) = segments.iter().map(|s| s.max_timestamp).max().filter(|t| *t >= 0) else {
            return Ok(None);
        };
        let found = self.find_time_below(key, newest, LogState::log_end, times).await?;
        let Some(first) = segments.first().filter(|s| found.is_none() && s.base < log_start) else {
            return Ok(found);
        };
        // That record was deleted. Only the first segment lacks records: what is left of it is looked through.
        let mut newest = segments[1..].iter().map(|s| s.max_timestamp).max().unwrap_or(i64::MIN);
        let mut from = log_start;
        loop {
            let is_left =
                |batch: &Batch| batch.header.segment_base != first.base || batch.header.max_timestamp > newest;
            let batch = self.first_batch(key, from, LogState::log_end, is_left).await?;
            let Some(batch) = batch.filter(|b| b.header.segment_base == first.base) else {
                break;
            };
            let look = |record: FoundTime| {
                newest = newest.max(record.timestamp);
                true
            };
            each_record(&batch, log_start, times, look)
                .await
                .map_err(ReadError::Batch)?;
            from = batch.header.last_offset + 1;
        }
        if newest < 0 {
            return Ok(None);
        }
        self.find_time_below(key, newest, LogState::log_end, times).await
    }
}
