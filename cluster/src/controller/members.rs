//! Members of the metadata quorum: who joins, who votes.

use uuid::Uuid;

use super::{ControllerError, brokers};
use crate::metadata::{ConfigResource, Image, Member, MetadataRecord};

/// Setting of a broker whose place another data folder may take, once: the operator's word that the one it had is out of use.
pub const REPLACEABLE: &str = "broker.replaceable";

/// A node that wants to take part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Joining {
    /// Its id.
    pub node: i32,
    /// Its data folder.
    pub directory: [u8; 16],
    /// Where the others reach it.
    pub address: String,
    /// Whether no process runs any more where the node was with the folder that it had before.
    pub old_is_gone: bool,
}

/// Where the node's process with another folder may still run, if nobody has said that it does not: whoever asks to join has to
/// find out. A process that is only stopped or cut off would come back to find its place taken.
#[must_use]
pub fn may_live<'a>(image: &'a Image, joining: &Joining) -> Option<&'a str> {
    let known = (image.member(joining.node)).filter(|m| m.directory != joining.directory)?;
    let word = image.config(&ConfigResource::Broker(Some(joining.node)), REPLACEABLE) == Some("true");
    // At its own address nobody else can run.
    (!word && known.address != joining.address && !joining.old_is_gone).then_some(&known.address)
}

/// A node joins, or says that it is somewhere else now. A new one listens until it is made a voter. One that comes back with an
/// emptied folder is a new member: it is in no ISR any more, and votes again once it has caught up, if it voted before.
///
/// # Errors
/// [`ControllerError::DuplicateBroker`] while the node takes part with another folder, or may do so.
pub fn join(image: &Image, joining: &Joining) -> Result<Vec<MetadataRecord>, ControllerError> {
    let known = image.member(joining.node);
    let mut member = Member {
        node: joining.node,
        directory: joining.directory,
        // Unlike that of any folder that this node had before.
        generation: image.version as u32,
        address: joining.address.clone(),
        voter: known.is_some_and(|m| m.voter),
    };
    let mut records = Vec::new();
    if let Some(known) = known {
        if known.directory == joining.directory {
            member.generation = known.generation;
        } else if image.is_active(joining.node) {
            return Err(ControllerError::DuplicateBroker {
                reason: format!(
                    "node.id {} is in use by a broker with another data folder; give this one an id of its own, or stop the other",
                    joining.node
                ),
            });
        } else if let Some(address) = may_live(image, joining) {
            return Err(ControllerError::DuplicateBroker {
                reason: format!(
                    "node {0} is in this cluster with another data folder, and may still run at {address}: give this one an id of its own, or, if \
                     the other will not run again, say so with `millrace cluster replace-node {0}`",
                    joining.node
                ),
            });
        } else {
            records.extend(brokers::emptied(image, joining.node));
            let resource = ConfigResource::Broker(Some(joining.node));
            if image.config(&resource, REPLACEABLE).is_some() {
                records.push(MetadataRecord::Config {
                    resource,
                    name: REPLACEABLE.into(),
                    value: None,
                });
            }
        }
        if *known == member {
            return Ok(Vec::new());
        }
    }
    records.push(MetadataRecord::Member(member));
    Ok(records)
}

/// A member is to vote, or not any more (KIP-853). `directory` is nil if whoever asks does not know it.
///
/// # Errors
/// [`ControllerError::UnknownVoter`]; [`ControllerError::InvalidRequest`] for the last voter.
pub fn set_voter(
    image: &Image,
    node: i32,
    directory: Uuid,
    voter: bool,
) -> Result<Vec<MetadataRecord>, ControllerError> {
    let unknown = |reason: String| Err(ControllerError::UnknownVoter { reason });
    let Some(member) = image.member(node) else {
        return unknown(format!(
            "node {node} is not a member: start it with --peers that name this cluster's nodes, and it joins"
        ));
    };
    if !directory.is_nil() && directory.into_bytes() != member.directory {
        return unknown(format!(
            "node {node} has the data folder {}",
            Uuid::from_bytes(member.directory)
        ));
    }
    if member.voter == voter {
        return Ok(Vec::new());
    }
    if !voter && image.members().filter(|m| m.voter).count() == 1 {
        return Err(ControllerError::InvalidRequest {
            reason: format!("node {node} is the only voter"),
        });
    }
    Ok(vec![MetadataRecord::Member(Member {
        voter,
        ..member.clone()
    })])
}

/// What all brokers may say and write from now on.
///
/// # Errors
/// [`ControllerError`] if a member's build does not know the level, or it would go down.
pub fn raise_level(image: &Image, level: u16) -> Result<Vec<MetadataRecord>, ControllerError> {
    if level == image.feature_level {
        return Ok(Vec::new());
    }
    let refused = |reason: String| Err(ControllerError::InvalidFeature { reason });
    if level < image.feature_level {
        return refused(format!(
            "the feature level is {} and does not go down",
            image.feature_level
        ));
    }
    let cannot = |b: &&crate::metadata::Broker| level > b.registration.levels.1;
    if let Some(broker) = image.brokers().find(cannot) {
        return refused(format!(
            "broker {} runs a build that knows levels up to {}: upgrade it first",
            broker.registration.node, broker.registration.levels.1
        ));
    }
    Ok(vec![MetadataRecord::FeatureLevel { level }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        controller::brokers::tests::{cluster, partition, registration},
        metadata::PartitionImage,
    };

    fn joining(node: i32, directory: u8) -> Joining {
        Joining {
            node,
            directory: [directory; 16],
            address: "h:1".into(),
            old_is_gone: false,
        }
    }

    fn apply(image: &Image, records: Result<Vec<MetadataRecord>, ControllerError>) -> Image {
        let mut next = image.apply(&records.expect("sound"));
        next.version += 1;
        next
    }

    #[test]
    fn a_node_joins_listens_and_is_made_a_voter() {
        let image = apply(&Image::default(), join(&Image::default(), &joining(4, 4)));
        assert!(!image.member(4).expect("joined").voter);
        assert!(join(&image, &joining(4, 4)).expect("again").is_empty());
        assert!(set_voter(&image, 5, Uuid::nil(), true).is_err());
        assert!(
            set_voter(&image, 4, Uuid::from_u128(7), true).is_err(),
            "another folder"
        );
        let image = apply(&image, set_voter(&image, 4, Uuid::nil(), true));
        assert!(image.member(4).expect("there").voter);
        assert!(set_voter(&image, 4, Uuid::nil(), false).is_err(), "the last one");
    }

    #[test]
    fn an_emptied_folder_is_another_member_in_no_isr_and_two_folders_do_not_share_an_id() {
        let image = cluster(&[1]);
        let image = apply(&image, join(&image, &joining(1, 1)));
        let image = apply(&image, set_voter(&image, 1, Uuid::nil(), true));
        assert!(matches!(
            join(&image, &joining(1, 77)),
            Err(ControllerError::DuplicateBroker { .. })
        ));
        assert!(brokers::register(&image, &registration(1, 77)).is_err());
        let before = image.member(1).expect("there").clone();
        let image = image.apply(&brokers::fence(&image, 1));
        let image = apply(&image, join(&image, &joining(1, 77)));
        let member = image.member(1).expect("there");
        assert!(member.voter && member.generation != before.generation);
        let p: PartitionImage = partition(&image);
        assert_eq!(
            (p.leader, p.isr.len()),
            (-1, 0),
            "nobody hides that its records are lost"
        );
        assert!(
            brokers::register(&image, &registration(1, 1)).is_err(),
            "the old folder"
        );
        assert!(brokers::register(&image, &registration(1, 77)).is_ok());
    }

    #[test]
    fn another_machine_takes_the_place_of_one_that_is_gone_or_by_the_operators_word() {
        let image = cluster(&[1, 2]);
        let image = apply(&image, join(&image, &joining(1, 1)));
        let image = image.apply(&brokers::fence(&image, 1));
        let elsewhere = Joining {
            address: "h:2".into(),
            ..joining(1, 77)
        };
        let refused = join(&image, &elsewhere).expect_err("it may be stopped only");
        assert!(refused.to_string().contains("replace-node 1"), "{refused}");
        assert_eq!(may_live(&image, &elsewhere), Some("h:1"));
        assert_eq!(may_live(&image, &joining(1, 77)), None, "its own address");
        let gone = Joining {
            old_is_gone: true,
            ..elsewhere.clone()
        };
        assert!(join(&image, &gone).is_ok());
        let resource = ConfigResource::Broker(Some(1));
        let said = image.apply(&[MetadataRecord::Config {
            resource: resource.clone(),
            name: REPLACEABLE.into(),
            value: Some("true".into()),
        }]);
        let image = apply(&said, join(&said, &elsewhere));
        assert_eq!(image.member(1).expect("joined").directory, [77; 16]);
        assert_eq!(image.config(&resource, REPLACEABLE), None, "once");
        let third = Joining {
            address: "h:3".into(),
            ..joining(1, 78)
        };
        assert!(join(&image, &third).is_err());
    }

    #[test]
    fn a_level_is_raised_once_every_broker_knows_it() {
        let image = cluster(&[1]).apply(&[MetadataRecord::FeatureLevel { level: 1 }]);
        assert!(raise_level(&image, 1).expect("as it is").is_empty());
        assert!(raise_level(&image, 2).is_err());
        assert!(raise_level(&image, 0).is_err());
    }
}
