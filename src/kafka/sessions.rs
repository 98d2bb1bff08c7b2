//! Fetch sessions (KIP-227): the broker remembers what a consumer fetches, so that it need only say what changed.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

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

/// Partitions of a fetch, in their order.
pub type Partitions = Rc<Vec<(SessionPartition, Wanted)>>;

/// What a client was told of one of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Told {
    /// High watermark, -1 with an error.
    pub high_watermark: i64,
    /// First offset of the log, -1 with an error.
    pub log_start: i64,
    /// With records.
    pub gave: bool,
}

#[derive(Debug)]
struct Session {
    /// The epoch that the next request must have.
    next_epoch: i32,
    /// In the order of first mention; rotated so that none starves.
    partitions: Partitions,
    /// What they take, about.
    bytes: usize,
    used: u64,
}

/// Bytes that partitions of a session take, about.
fn bytes_of(partitions: &[(SessionPartition, Wanted)]) -> usize {
    let names: usize = partitions.iter().map(|(p, _)| p.topic.len()).sum();
    names + size_of_val(partitions)
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
    bytes_max: usize,
    bytes: usize,
    clock: u64,
    by_id: HashMap<i32, Session>,
}

impl Sessions {
    /// Room for `slots` that take so many bytes together; the one used longest ago goes for the next.
    #[must_use]
    pub fn new(slots: usize, bytes_max: usize) -> Self {
        Self {
            slots,
            bytes_max,
            bytes: 0,
            clock: 0,
            by_id: HashMap::new(),
        }
    }

    /// Keeps a new session; 0 if none are kept, or it is too large: the client then sends all that it fetches each time.
    pub fn create(&mut self, partitions: Partitions) -> i32 {
        let bytes = bytes_of(&partitions);
        if self.slots == 0 || bytes > self.bytes_max {
            return 0;
        }
        self.make_room(self.slots - 1, bytes);
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
                bytes,
                used: self.clock,
            },
        );
        self.bytes += bytes;
        id
    }

    /// Ends those used longest ago, until there are no more than so many and room for so many bytes.
    fn make_room(&mut self, slots: usize, bytes: usize) {
        while self.by_id.len() > slots || self.bytes + bytes > self.bytes_max {
            let oldest = self.by_id.iter().min_by_key(|(_, s)| s.used).map(|(id, _)| *id);
            let Some(oldest) = oldest else { return };
            self.remove(oldest);
        }
    }

    /// Ends a session.
    pub fn remove(&mut self, id: i32) {
        if let Some(session) = self.by_id.remove(&id) {
            self.bytes -= session.bytes;
        }
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
        forgotten: &HashSet<SessionPartition>,
    ) -> Result<Partitions, SessionError> {
        let session = self.by_id.get_mut(&id).ok_or(SessionError::NotFound)?;
        if session.next_epoch != epoch {
            return Err(SessionError::InvalidEpoch);
        }
        session.next_epoch = if epoch == i32::MAX { 1 } else { epoch + 1 };
        self.clock += 1;
        session.used = self.clock;
        if !forgotten.is_empty() {
            Rc::make_mut(&mut session.partitions).retain(|(p, _)| !forgotten.contains(p));
        }
        let is_same = changed.is_empty() && forgotten.is_empty();
        if !changed.is_empty() {
            let partitions = Rc::make_mut(&mut session.partitions);
            let places: HashMap<SessionPartition, usize> = (partitions.iter().enumerate())
                .map(|(i, (p, _))| (p.clone(), i))
                .collect();
            for (partition, wanted) in changed {
                match places.get(&partition) {
                    Some(place) => {
                        let old = partitions[*place].1;
                        partitions[*place].1 = Wanted {
                            told_high_watermark: old.told_high_watermark,
                            told_log_start: old.told_log_start,
                            ..wanted
                        };
                    }
                    None => partitions.push((partition, wanted)),
                }
            }
        }
        if !is_same {
            let bytes = bytes_of(&session.partitions);
            self.bytes = self.bytes - session.bytes + bytes;
            session.bytes = bytes;
        }
        let partitions = Rc::clone(&session.partitions);
        // It is the one used last: it goes only if it is too large by itself, and its client is told the next time.
        self.make_room(self.slots, 0);
        Ok(partitions)
    }

    /// Notes what a client was told of the partitions of its fetch, and moves those that gave records to the end.
    pub fn told(&mut self, id: i32, partitions: Partitions, told: &[Told]) {
        let Some(session) = self.by_id.get_mut(&id) else { return };
        // Another request may have changed the session meanwhile.
        if !Rc::ptr_eq(&session.partitions, &partitions) {
            return;
        }
        drop(partitions);
        let news = |((_, w), t): (&(SessionPartition, Wanted), &Told)| {
            t.gave || w.told_high_watermark != t.high_watermark || w.told_log_start != t.log_start
        };
        if !session.partitions.iter().zip(told).any(news) {
            return;
        }
        let partitions = Rc::make_mut(&mut session.partitions);
        for ((_, wanted), told) in partitions.iter_mut().zip(told) {
            wanted.told_high_watermark = told.high_watermark;
            wanted.told_log_start = told.log_start;
        }
        if told.iter().any(|t| t.gave) {
            let (mut front, mut back) = (Vec::with_capacity(partitions.len()), Vec::new());
            for (partition, told) in partitions.drain(..).zip(told) {
                if told.gave { &mut back } else { &mut front }.push(partition);
            }
            front.append(&mut back);
            *partitions = front;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 1 << 20;

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
        let mut sessions = Sessions::new(2, BYTES);
        let id = sessions.create(Rc::new(vec![(partition(0), WANTED), (partition(1), WANTED)]));
        let moved = Wanted { offset: 9, ..WANTED };
        let now = sessions
            .update(
                id,
                1,
                vec![(partition(1), moved), (partition(2), WANTED)],
                &HashSet::from([partition(0)]),
            )
            .expect("in step");
        assert_eq!(*now, [(partition(1), moved), (partition(2), WANTED)]);
        assert_eq!(
            sessions.update(id, 1, vec![], &HashSet::new()),
            Err(SessionError::InvalidEpoch)
        );
        assert!(sessions.update(id, 2, vec![], &HashSet::new()).is_ok());
    }

    #[test]
    fn who_gave_records_is_asked_last() {
        let mut sessions = Sessions::new(1, BYTES);
        let id = sessions.create(Rc::new((0..4).map(|n| (partition(n), WANTED)).collect()));
        let order = |sessions: &mut Sessions, epoch| {
            let now = sessions.update(id, epoch, vec![], &HashSet::new()).expect("in step");
            let order: Vec<i32> = now.iter().map(|(p, _)| p.partition).collect();
            (now, order)
        };
        let told = |gave| Told {
            high_watermark: 7,
            log_start: 3,
            gave,
        };
        let (now, _) = order(&mut sessions, 1);
        sessions.told(id, now, &[told(true), told(false), told(true), told(false)]);
        let (now, found) = order(&mut sessions, 2);
        assert_eq!(found, [1, 3, 0, 2]);
        assert!(
            now.iter()
                .all(|(_, w)| (w.told_high_watermark, w.told_log_start) == (7, 3))
        );
        // What a client was told of what is no longer asked for is not taken for what is.
        let changed = vec![(partition(9), WANTED)];
        let (late, later) = (now, sessions.update(id, 3, changed, &HashSet::from([partition(1)])));
        sessions.told(id, late, &[told(true); 4]);
        let (now, found) = order(&mut sessions, 4);
        assert_eq!(found, [3, 0, 2, 9]);
        assert_eq!(Ok(now), later);
    }

    #[test]
    fn sessions_take_no_more_than_their_bytes() {
        let session = |partitions: i32| Rc::new((0..partitions).map(|n| (partition(n), WANTED)).collect::<Vec<_>>());
        let one = bytes_of(&session(1));
        let mut sessions = Sessions::new(100, 10 * one);
        assert_eq!(sessions.create(session(11)), 0, "larger than all of it");
        let first = sessions.create(session(4));
        let second = sessions.create(session(4));
        let third = sessions.create(session(4));
        let mut known = |id, epoch| sessions.update(id, epoch, Vec::new(), &HashSet::new()).is_ok();
        assert!(!known(first, 1) && known(second, 1) && known(third, 1));
        // The second grows, and the third, used before it, goes.
        let more = (4..8).map(|n| (partition(n), WANTED)).collect();
        assert!(sessions.update(second, 2, more, &HashSet::new()).is_ok());
        assert!(sessions.update(third, 2, Vec::new(), &HashSet::new()).is_err());
        assert_eq!(sessions.bytes, 8 * one);
        sessions.remove(second);
        assert_eq!(sessions.bytes, 0);
    }

    #[test]
    fn the_oldest_goes_when_all_slots_are_used() {
        let mut sessions = Sessions::new(2, BYTES);
        let none = HashSet::new();
        let first = sessions.create(Partitions::default());
        let second = sessions.create(Partitions::default());
        sessions.update(first, 1, vec![], &none).expect("there");
        sessions.create(Partitions::default());
        assert_eq!(sessions.update(second, 1, vec![], &none), Err(SessionError::NotFound));
        assert!(sessions.update(first, 2, vec![], &none).is_ok());
    }
}
