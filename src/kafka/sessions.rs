//! Fetch sessions (KIP-227): the broker remembers what a consumer fetches, so that it need only say what changed.

use std::collections::HashMap;

use uuid::Uuid;

/// A partition of a session, as the client named its topic.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SessionPartition {
    /// By name up to version 12.
    pub topic: String,
    /// By id from version 13.
    pub topic_id: Uuid,
    /// Index.
    pub partition: i32,
}

/// What is fetched of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Next offset.
    pub offset: i64,
    /// Most bytes.
    pub max_bytes: i32,
    /// The leader epoch the client knows, -1 unknown.
    pub current_leader_epoch: i32,
    /// Epoch of the last record fetched, -1 unknown.
    pub last_fetched_epoch: i32,
    /// What the client was last told, to leave out what has not changed.
    pub told_high_watermark: i64,
    /// Likewise.
    pub told_log_start: i64,
}

/// One session.
#[derive(Clone, Debug, Default)]
pub struct Session {
    /// The epoch that the next request must have.
    pub next_epoch: i32,
    /// In the order of first mention; rotated so that none starves.
    pub partitions: Vec<(SessionPartition, Wanted)>,
    used: u64,
}

/// Why a session request fails; the client then begins anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionError {
    /// Not here: it was evicted, or the client came back on another core.
    NotFound,
    /// Out of step.
    InvalidEpoch,
}

/// Sessions of one shard.
#[derive(Debug)]
pub struct Sessions {
    slots: usize,
    clock: u64,
    by_id: HashMap<i32, Session>,
}

impl Sessions {
    /// Room for `slots`; the one used longest ago goes for the next.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self {
            slots,
            clock: 0,
            by_id: HashMap::new(),
        }
    }

    /// Keeps a new session; 0 if none are kept.
    pub fn create(&mut self, partitions: Vec<(SessionPartition, Wanted)>) -> i32 {
        if self.slots == 0 {
            return 0;
        }
        if self.by_id.len() >= self.slots
            && let Some(oldest) = self.by_id.iter().min_by_key(|(_, s)| s.used).map(|(id, _)| *id)
        {
            self.by_id.remove(&oldest);
        }
        let id = loop {
            // Random, so that a session of another shard or an earlier start is not taken for ours.
            let id = (Uuid::new_v4().as_u128() as i32) & i32::MAX;
            if id != 0 && !self.by_id.contains_key(&id) {
                break id;
            }
        };
        self.clock += 1;
        self.by_id.insert(
            id,
            Session {
                next_epoch: 1,
                partitions,
                used: self.clock,
            },
        );
        id
    }

    /// Ends a session.
    pub fn remove(&mut self, id: i32) {
        self.by_id.remove(&id);
    }

    /// Takes in what changed and returns all that is to be fetched.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn update(
        &mut self,
        id: i32,
        epoch: i32,
        changed: Vec<(SessionPartition, Wanted)>,
        forgotten: &[SessionPartition],
    ) -> Result<Vec<(SessionPartition, Wanted)>, SessionError> {
        let session = self.by_id.get_mut(&id).ok_or(SessionError::NotFound)?;
        if session.next_epoch != epoch {
            return Err(SessionError::InvalidEpoch);
        }
        session.next_epoch = if epoch == i32::MAX { 1 } else { epoch + 1 };
        self.clock += 1;
        session.used = self.clock;
        session.partitions.retain(|(p, _)| !forgotten.contains(p));
        if !changed.is_empty() {
            let places: HashMap<SessionPartition, usize> = session
                .partitions
                .iter()
                .enumerate()
                .map(|(i, (p, _))| (p.clone(), i))
                .collect();
            for (partition, wanted) in changed {
                match places.get(&partition) {
                    Some(place) => {
                        let old = session.partitions[*place].1;
                        session.partitions[*place].1 = Wanted {
                            told_high_watermark: old.told_high_watermark,
                            told_log_start: old.told_log_start,
                            ..wanted
                        };
                    }
                    None => session.partitions.push((partition, wanted)),
                }
            }
        }
        Ok(session.partitions.clone())
    }

    /// Notes what a client was told, and moves partitions that gave records to the end.
    pub fn told(&mut self, id: i32, told: &HashMap<SessionPartition, (i64, i64, bool)>) {
        let Some(session) = self.by_id.get_mut(&id) else { return };
        let (mut front, mut back) = (Vec::new(), Vec::new());
        for (partition, mut wanted) in std::mem::take(&mut session.partitions) {
            match told.get(&partition) {
                Some((high_watermark, log_start, gave)) => {
                    wanted.told_high_watermark = *high_watermark;
                    wanted.told_log_start = *log_start;
                    if *gave { &mut back } else { &mut front }.push((partition, wanted));
                }
                None => front.push((partition, wanted)),
            }
        }
        front.append(&mut back);
        session.partitions = front;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(n: i32) -> SessionPartition {
        SessionPartition {
            topic: "t".into(),
            topic_id: Uuid::nil(),
            partition: n,
        }
    }

    const WANTED: Wanted = Wanted {
        offset: 0,
        max_bytes: 1,
        current_leader_epoch: -1,
        last_fetched_epoch: -1,
        told_high_watermark: -1,
        told_log_start: -1,
    };

    #[test]
    fn a_session_remembers_and_forgets() {
        let mut sessions = Sessions::new(2);
        let id = sessions.create(vec![(partition(0), WANTED), (partition(1), WANTED)]);
        let moved = Wanted { offset: 9, ..WANTED };
        let now = sessions
            .update(
                id,
                1,
                vec![(partition(1), moved), (partition(2), WANTED)],
                &[partition(0)],
            )
            .expect("in step");
        assert_eq!(now, vec![(partition(1), moved), (partition(2), WANTED)]);
        assert_eq!(sessions.update(id, 1, vec![], &[]), Err(SessionError::InvalidEpoch));
        assert!(sessions.update(id, 2, vec![], &[]).is_ok());
    }

    #[test]
    fn the_oldest_goes_when_all_slots_are_used() {
        let mut sessions = Sessions::new(2);
        let first = sessions.create(vec![]);
        let second = sessions.create(vec![]);
        sessions.update(first, 1, vec![], &[]).expect("there");
        sessions.create(vec![]);
        assert_eq!(sessions.update(second, 1, vec![], &[]), Err(SessionError::NotFound));
        assert!(sessions.update(first, 2, vec![], &[]).is_ok());
    }
}
