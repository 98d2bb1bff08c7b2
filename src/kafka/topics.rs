//! What several handlers ask of topics.

use std::{rc::Rc, sync::Arc};

use kafka_protocol::ResponseError;
use millrace_cluster::metadata::TopicImage;
use uuid::Uuid;

use super::errors::Failure;
use crate::{
    coordinator::controller::CaughtUp,
    node::{Node, View},
};

/// The metadata that a request is answered by. What it does not know another node may have agreed on a moment ago and sent the
/// client here for: then this one catches up first.
pub async fn view_for<'a>(node: &Rc<Node>, mut topics: impl Iterator<Item = (&'a str, Uuid)>) -> Arc<View> {
    let view = node.view();
    let is_known = |(name, id): (&str, Uuid)| match id.is_nil() {
        true => view.image.topic(name).is_some(),
        false => view.image.topic_by_id(&id).is_some(),
    };
    if topics.all(is_known) {
        return view;
    }
    catch_up(node).await;
    node.view()
}

/// Waits until this node knows all that was agreed on before.
pub async fn catch_up(node: &Rc<Node>) -> CaughtUp {
    let caught_up = (node.router).call(
        node,
        0,
        |n| async move { n.coordinator().controller.catch_up(&n).await },
    );
    // A broker that stops has nobody to ask.
    caught_up.await.unwrap_or(CaughtUp::NoQuorum)
}

/// A topic as a request names it.
///
/// # Errors
/// Unknown topic, or unknown topic id.
pub fn find<'a>(view: &'a View, name: &str, id: Uuid, by_id: bool) -> Result<&'a Arc<TopicImage>, Failure> {
    if by_id {
        let unknown = || {
            Failure::new(
                ResponseError::UnknownTopicId,
                "This server does not host this topic ID.",
            )
        };
        return view.image.topic_by_id(&id).ok_or_else(unknown);
    }
    view.image.topic(name).ok_or_else(Failure::unknown_partition)
}

/// Compares the leader epoch a client knows with ours (KIP-320); -1 is "unknown".
///
/// # Errors
/// Fenced if the client's is older, unknown if it is newer.
pub fn check_epoch(clients: i32, ours: i32) -> Result<(), Failure> {
    match clients {
        -1 => Ok(()),
        epoch if epoch < ours => Err(ResponseError::FencedLeaderEpoch.into()),
        epoch if epoch > ours => Err(ResponseError::UnknownLeaderEpoch.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leader_epochs_are_compared() {
        for (clients, ours, expected) in [
            (-1, 5, None),
            (5, 5, None),
            (4, 5, Some(ResponseError::FencedLeaderEpoch)),
            (6, 5, Some(ResponseError::UnknownLeaderEpoch)),
        ] {
            assert_eq!(check_epoch(clients, ours).err().map(|f| f.error), expected);
        }
    }
}
