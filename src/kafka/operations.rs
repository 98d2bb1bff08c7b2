//! What clients are authorized to do, as sets of bits (KIP-430). Without an authorizer everybody may do all that there is to do, as in
//! Kafka; the bits are the codes of `AclOperation`.

const READ: u8 = 3;
const WRITE: u8 = 4;
const CREATE: u8 = 5;
const DELETE: u8 = 6;
const ALTER: u8 = 7;
const DESCRIBE: u8 = 8;
const CLUSTER_ACTION: u8 = 9;
const DESCRIBE_CONFIGS: u8 = 10;
const ALTER_CONFIGS: u8 = 11;
const IDEMPOTENT_WRITE: u8 = 12;

/// On the cluster.
pub const OF_CLUSTERS: i32 = set(&[
    CREATE,
    ALTER,
    DESCRIBE,
    CLUSTER_ACTION,
    DESCRIBE_CONFIGS,
    ALTER_CONFIGS,
    IDEMPOTENT_WRITE,
]);
/// On a topic.
pub const OF_TOPICS: i32 = set(&[
    READ,
    WRITE,
    CREATE,
    DELETE,
    ALTER,
    DESCRIBE,
    DESCRIBE_CONFIGS,
    ALTER_CONFIGS,
]);
/// On a group.
pub const OF_GROUPS: i32 = set(&[READ, DELETE, DESCRIBE, DESCRIBE_CONFIGS, ALTER_CONFIGS]);

const fn set(operations: &[u8]) -> i32 {
    let (mut bits, mut i) = (0, 0);
    while i < operations.len() {
        bits |= 1 << operations[i];
        i += 1;
    }
    bits
}

/// What an answer says of them: nothing, unless it was asked for.
#[must_use]
pub const fn told(asked: bool, all: i32) -> i32 {
    if asked { all } else { i32::MIN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_operations_are_those_of_kafka() {
        // Answers of Kafka 4.4.0 without an authorizer.
        assert_eq!((OF_CLUSTERS, OF_TOPICS, OF_GROUPS), (8096, 3576, 3400));
    }
}
