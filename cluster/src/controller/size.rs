//! How large one change of the metadata may be. It is one entry of the quorum's log: it is sent, flushed, applied and handed to every
//! shard as a whole, and meanwhile nothing else is.

use super::ControllerError;
use crate::metadata::{ConfigResource, MetadataRecord, PartitionImage};

/// Records of one change. Kafka's bound for what one request may change.
pub const RECORDS_MAX: usize = 10_000;
/// Bytes of one change, about.
pub const BYTES_MAX: usize = 4 << 20;
/// Bytes of a configuration value. Kafka's bound.
pub const CONFIG_VALUE_MAX: usize = i16::MAX as usize;

/// What stands beside strings and lists in a record, at the most.
const FIXED: usize = 128;

/// Bytes of a record in the log, about.
fn bytes(record: &MetadataRecord) -> usize {
    let replicas = |p: &PartitionImage| {
        [&p.replicas, &p.isr, &p.elr, &p.adding, &p.removing]
            .iter()
            .map(|list| list.len() * size_of::<i32>())
            .sum()
    };
    let beside = match record {
        MetadataRecord::Topic { name, .. } => name.len(),
        MetadataRecord::Partition { state, .. } => replicas(state),
        MetadataRecord::Config { resource, name, value } => {
            let of = match resource {
                ConfigResource::Topic(name) => name.len(),
                ConfigResource::Broker(_) => 0,
            };
            of + name.len() + value.as_ref().map_or(0, String::len)
        }
        MetadataRecord::Broker(r) => (r.clients.iter().chain(&r.peers)).map(|a| a.host.len() + FIXED).sum(),
        _ => 0,
    };
    FIXED + beside
}

/// The room that one change has left.
pub struct Room {
    records: usize,
    bytes: usize,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            records: RECORDS_MAX,
            bytes: BYTES_MAX,
        }
    }
}

impl Room {
    /// Takes room for these records; false, and nothing is taken, if there is too little.
    pub fn take(&mut self, records: &[MetadataRecord]) -> bool {
        let after = records
            .iter()
            .try_fold(self.bytes, |left, r| left.checked_sub(bytes(r)));
        match (self.records.checked_sub(records.len()), after) {
            (Some(records), Some(bytes)) => {
                *self = Self { records, bytes };
                true
            }
            _ => false,
        }
    }
}

/// Refuses what is too much for one change.
///
/// # Errors
/// [`ControllerError::PolicyViolation`], as Kafka does.
pub fn check(records: &[MetadataRecord]) -> Result<(), ControllerError> {
    if Room::default().take(records) {
        return Ok(());
    }
    Err(ControllerError::PolicyViolation {
        reason: format!(
            "Unable to perform excessively large batch operation: at most {RECORDS_MAX} records, and {BYTES_MAX} bytes of them, change \
             at once, one for each topic, partition and configuration entry. Ask for less at a time."
        ),
    })
}

/// Leaves as many records as one change takes, and at least one; returns whether that are not all.
#[must_use]
pub fn take_part(records: &mut Vec<MetadataRecord>) -> bool {
    let mut room = Room::default();
    let part = records.iter().take_while(|r| room.take(std::slice::from_ref(r)));
    let part = part.count().max(1);
    let is_part = part < records.len();
    records.truncate(part);
    is_part
}

/// Refuses a configuration value that is too long.
///
/// # Errors
/// [`ControllerError::InvalidConfig`], as Kafka does.
pub fn check_value(name: &str, value: &str) -> Result<(), ControllerError> {
    if value.len() <= CONFIG_VALUE_MAX {
        return Ok(());
    }
    Err(ControllerError::InvalidConfig {
        reason: format!(
            "The configuration value cannot be added because it exceeds the maximum value size of {CONFIG_VALUE_MAX} bytes: {name} was \
             given {}.",
            value.len()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::record;

    fn partition(n: u32) -> MetadataRecord {
        MetadataRecord::Partition {
            topic: [0; 16],
            partition: n,
            state: PartitionImage::new(vec![1, 2, 3]),
        }
    }

    fn config(len: usize) -> MetadataRecord {
        MetadataRecord::Config {
            resource: ConfigResource::Topic("t".into()),
            name: "retention.ms".into(),
            value: Some("0".repeat(len)),
        }
    }

    #[test]
    fn a_change_is_bounded_in_records_and_in_bytes() {
        let many: Vec<_> = (0..RECORDS_MAX as u32 + 1).map(partition).collect();
        assert!(check(&many[1..]).is_ok());
        assert!(matches!(check(&many), Err(ControllerError::PolicyViolation { .. })));
        let large = vec![config(CONFIG_VALUE_MAX); BYTES_MAX / CONFIG_VALUE_MAX];
        assert!(matches!(check(&large), Err(ControllerError::PolicyViolation { .. })));
        assert!(check(&large[..large.len() / 2]).is_ok());
    }

    #[test]
    fn no_record_is_longer_than_it_counts() {
        let address = crate::metadata::Address {
            host: "x".repeat(300),
            port: 1,
        };
        for record in [
            partition(7),
            config(5_000),
            MetadataRecord::Topic {
                id: [1; 16],
                name: "x".repeat(249),
            },
            MetadataRecord::Broker(crate::metadata::Registration {
                node: 1,
                incarnation: [0; 16],
                directory: [0; 16],
                clients: vec![address.clone(); 8],
                peers: vec![address; 8],
                rack: None,
                min_insync: 1,
                start: 1,
                levels: (1, 1),
            }),
        ] {
            let one = record::encode(&vec![record.clone()]).len();
            let all = record::encode(&vec![record.clone(); 100]).len();
            let each = (all - one) / 99;
            assert!(each <= bytes(&record), "{each} of {}: {record:?}", bytes(&record));
        }
    }

    #[test]
    fn what_is_too_much_for_one_change_is_made_in_parts() {
        let mut left: Vec<_> = (0..25_000).map(partition).collect();
        let all = left.clone();
        let mut made = Vec::new();
        let mut is_part = true;
        while is_part {
            let mut part = left.clone();
            is_part = take_part(&mut part);
            assert!(check(&part).is_ok());
            left.drain(..part.len());
            made.extend(part);
        }
        assert_eq!(made, all);
    }

    #[test]
    fn a_value_is_as_long_as_kafka_lets_it_be() {
        assert!(check_value("x", &"v".repeat(32_767)).is_ok());
        assert!(matches!(
            check_value("x", &"v".repeat(32_768)),
            Err(ControllerError::InvalidConfig { .. })
        ));
    }
}
