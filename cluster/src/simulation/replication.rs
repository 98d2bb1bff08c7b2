//! Leaders and followers of a world at work.

use millrace_engine::Offset;

use super::{
    Bug, TOPIC, World,
    node::{Entry, Message, Role},
};
use crate::{
    controller::brokers::{self, IsrChange},
    replica::{
        Answer, Next, Request,
        follower::{self, Decision, Stood},
        message::{Order, Says},
    },
};

impl World {
    pub(super) fn send(&mut self, from: usize, to: usize, message: Message) {
        let delay = 1 + self.rng.below(if self.faults { 15 } else { 2 }) as i64;
        let queue = self.links.entry((from, to)).or_default();
        let last = queue.back().map_or(0, |(at, _)| *at);
        queue.push_back(((self.now + delay).max(last), message));
    }

    pub(super) fn flush(&mut self, node: usize) {
        if !self.rng.chance(3) {
            return;
        }
        if let Some((log_start, to, request)) = self.nodes[node].starting.take() {
            self.nodes[node].log_start = self.nodes[node].log_start.max(log_start);
            self.tells_log_start(node, to, &request);
        }
        let extra = self.nodes[node].log.len() - self.nodes[node].durable;
        if extra == 0 {
            return;
        }
        let more = 1 + self.rng.below(extra as u64) as usize;
        self.nodes[node].durable += more;
        self.answer_appends(node);
    }

    /// A node notes the high watermark now and then.
    pub(super) fn note(&mut self, node: usize) {
        if !self.rng.chance(40) {
            return;
        }
        let n = &mut self.nodes[node];
        n.note(match self.bug {
            Bug::RecallsTooMuch => n.durable as Offset,
            _ => n.high_watermark,
        });
    }

    /// Answers the appends that are durable by now.
    pub(super) fn answer_appends(&mut self, node: usize) {
        let bug = self.bug;
        let n = &mut self.nodes[node];
        let durable = if bug == Bug::AckBeforeFlush {
            n.log_end()
        } else {
            n.durable as Offset
        };
        let mut answers = Vec::new();
        while n.appends.front().is_some_and(|(end, _, _)| *end <= durable) {
            answers.extend(n.appends.pop_front());
        }
        for (end, to, request) in answers {
            self.answer(node, to, &request, Says::Durable(end));
        }
    }

    pub(super) fn answer(&mut self, node: usize, to: usize, request: &Request, says: Says) {
        let answer = Answer {
            key: request.key,
            epoch: request.epoch,
            round: request.round,
            says,
        };
        self.send(node, to, Message::Answer(answer));
    }

    /// A leader looks at its own log and at its ISR.
    pub(super) fn tick(&mut self, node: usize) {
        let (now, bug) = (self.now, self.bug);
        let image = &self.image;
        let n = &mut self.nodes[node];
        let (log_start, log_end, durable) = (n.log_start, n.log_end(), n.durable as Offset);
        let epoch = n.epoch;
        let Role::Leads(leader) = &mut n.role else { return };
        leader.local(log_start, log_end, durable);
        n.high_watermark = n.high_watermark.max(match bug {
            Bug::HighWatermarkEarly => durable,
            _ => leader.high_watermark(),
        });
        let Some(wish) = leader.isr_wish(now, |other| image.is_active(other)) else {
            return;
        };
        let change = IsrChange {
            topic: TOPIC,
            partition: 0,
            leader_epoch: epoch,
            partition_epoch: wish.partition_epoch,
            isr: wish.isr,
        };
        let records = brokers::alter_isr(&self.image, node as i32, &[change]);
        let refused = records.is_empty();
        let answered = self.ask(records);
        let n = &mut self.nodes[node];
        let Role::Leads(leader) = &mut n.role else { return };
        // A no counts once all that it was decided on has come.
        if answered && refused && n.news.is_empty() {
            leader.wish_refused();
        } else if !answered || refused {
            leader.wish_unanswered();
        }
    }

    /// A leader sends what is due.
    pub(super) fn push(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        let (epoch, log_start, high_watermark) = (n.epoch, n.log_start, n.high_watermark);
        let Role::Leads(leader) = &mut n.role else { return };
        let mut requests = Vec::new();
        let followers: Vec<i32> = leader.followers().collect();
        for follower in followers {
            leader.connected(follower, true);
            leader.owes_note(follower);
            while let Some(next) = leader.next(follower) {
                let (round, order, batch) = match next {
                    Next::Order { round, order } => (round, order, Vec::new()),
                    Next::Batches { round, from } => {
                        let some: Vec<Entry> = n.log[from as usize..].iter().take(4).copied().collect();
                        let end = from + some.len() as Offset;
                        leader.sent(follower, round, end, some.len());
                        (round, Order::Append, some)
                    }
                };
                let first = match next {
                    Next::Batches { from, .. } => Some(from),
                    Next::Order { .. } => None,
                };
                let request = Request {
                    key: millrace_engine::PartitionKey {
                        topic: TOPIC,
                        partition: 0,
                    }
                    .into(),
                    epoch,
                    round,
                    high_watermark,
                    log_start,
                    order,
                };
                requests.push((follower as usize, Message::Request(request, first, batch)));
            }
        }
        for (to, message) in requests {
            let cuts = matches!(&message, Message::Request(r, _, _) if matches!(r.order, Order::Truncate { .. }));
            self.send(node, to, message);
            // Orders to cut are rare, and the worst to come late.
            if cuts && self.faults && self.rng.chance(4) {
                self.cut_link(node, to);
            }
        }
    }

    pub(super) fn deliver(&mut self) -> Result<(), String> {
        let links: Vec<(usize, usize)> = self.links.keys().copied().collect();
        for (from, to) in links {
            while self.active(to)
                && let Some(queue) = self.links.get_mut(&(from, to))
                && queue.front().is_some_and(|(at, _)| *at <= self.now)
                && let Some((_, message)) = queue.pop_front()
            {
                self.take(from, to, message)?;
            }
        }
        let mut unread = std::mem::take(&mut self.unread);
        for (from, to, queue) in &mut unread {
            while self.active(*to)
                && queue.front().is_some_and(|(at, _)| *at <= self.now)
                && let Some((_, message)) = queue.pop_front()
            {
                self.take(*from, *to, message)?;
            }
        }
        unread.retain(|(_, _, queue)| !queue.is_empty());
        self.unread.append(&mut unread);
        Ok(())
    }

    fn take(&mut self, from: usize, to: usize, message: Message) -> Result<(), String> {
        self.tell(|_| match &message {
            Message::Request(r, first, _) => format!(
                "{from} -> {to} epoch {} round {} {:?} {first:?} high watermark {}",
                r.epoch, r.round, r.order, r.high_watermark
            ),
            Message::Answer(a) => format!("{from} -> {to} epoch {} round {} {:?}", a.epoch, a.round, a.says),
        });
        match message {
            Message::Request(request, first, batch) => self.follow(to, from, request, first, batch),
            Message::Answer(answer) => {
                self.answered(to, from, &answer);
                Ok(())
            }
        }
    }

    pub(super) fn follow(
        &mut self,
        node: usize,
        from: usize,
        request: Request,
        first: Option<Offset>,
        batch: Vec<Entry>,
    ) -> Result<(), String> {
        let bug = self.bug;
        let n = &mut self.nodes[node];
        if bug == Bug::ObeysLateOrders {
            let mut before = request.clone();
            before.round = before.round.wrapping_sub(1);
            n.stood = Stood::default();
            n.stood.note(&before, Says::Stands(n.look().standing()));
        }
        let follows = match n.role {
            Role::Follows(leader) => Some(leader),
            _ => None,
        };
        let decision = follower::decide(&request, from as i32, first, (follows, n.epoch), n.stood, n.look());
        match decision {
            Decision::Answer(says) => {
                n.stood.note(&request, says);
                self.answer(node, from, &request, says);
                return Ok(());
            }
            Decision::Note => {}
            Decision::Truncate { to } | Decision::Restart { at: to } => {
                if to < n.high_watermark {
                    let text = format!("node {node} is to cut at {to}, below its high watermark");
                    return Err(self.fail(text));
                }
                n.cut(to);
                n.appends.clear();
                self.outcome.cuts += 1;
                let says = Says::Stands(self.nodes[node].look().standing());
                self.nodes[node].stood.note(&request, says);
                self.answer(node, from, &request, says);
                return Ok(());
            }
            Decision::Append => {
                let first_new = n.log_end();
                batch.into_iter().for_each(|entry| n.append(entry));
                let end = n.log_end();
                n.appends.push_back((end, from, request.clone()));
                self.note_producers(node, first_new);
                self.answer_appends(node);
            }
        }
        let n = &mut self.nodes[node];
        n.high_watermark = n.high_watermark.max(request.high_watermark.min(n.durable as Offset));
        if request.order == Order::Note && request.log_start > 0 {
            if request.log_start > n.log_start && request.log_start <= n.high_watermark {
                n.starting = Some((request.log_start, from, request));
            } else {
                self.tells_log_start(node, from, &request);
            }
        }
        Ok(())
    }

    fn tells_log_start(&mut self, node: usize, to: usize, request: &Request) {
        let log_start = self.nodes[node].log_start;
        self.answer(node, to, request, Says::LogStart(log_start));
    }

    pub(super) fn answered(&mut self, node: usize, from: usize, answer: &Answer) {
        let now = self.now;
        let n = &mut self.nodes[node];
        if n.epoch != answer.epoch {
            return;
        }
        if let Role::Leads(leader) = &mut n.role {
            leader.answered(from as i32, answer.round, answer.says, &n.epochs, 0, now);
        }
    }
}
