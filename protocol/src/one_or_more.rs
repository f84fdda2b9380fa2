//! A list that a document may write as its only value: what was one address before there could be one of each family.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Deserialize)]
#[serde(untagged)]
enum Form<T> {
    One(T),
    More(Vec<T>),
}

/// Writes nothing as null, one value as itself, more as a list.
///
/// # Errors
/// The format's own.
pub fn serialize<T: Serialize, S: Serializer>(list: &[T], to: S) -> Result<S::Ok, S::Error> {
    match list {
        [] => to.serialize_none(),
        [one] => one.serialize(to),
        more => more.serialize(to),
    }
}

/// Reads any of the forms; needs a format that describes itself, such as JSON.
///
/// # Errors
/// The format's own, and for values of another kind.
pub fn deserialize<'a, T: Deserialize<'a>, D: Deserializer<'a>>(from: D) -> Result<Vec<T>, D::Error> {
    Ok(match Option::deserialize(from)? {
        None => Vec::new(),
        Some(Form::One(one)) => vec![one],
        Some(Form::More(more)) => more,
    })
}

/// Checks that no two are of one family. Everything that takes one address of each asks this.
///
/// # Errors
/// The first that is too many, in words for people.
pub fn one_of_each_family(addresses: impl IntoIterator<Item = IpAddr>) -> Result<(), String> {
    let (mut v4, mut v6) = (None, None);
    for address in addresses {
        let (of, family) = match address {
            IpAddr::V4(_) => (&mut v4, "IPv4"),
            IpAddr::V6(_) => (&mut v6, "IPv6"),
        };
        if let Some(other) = of.replace(address) {
            return Err(format!(
                "{other} and {address} are both {family}: one of each family is taken"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Document {
        #[serde(default, with = "super")]
        list: Vec<u8>,
    }

    #[test]
    fn each_form_is_read_and_the_shortest_is_written() {
        for (text, list, written) in [
            ("{}", vec![], r#"{"list":null}"#),
            (r#"{"list":null}"#, vec![], r#"{"list":null}"#),
            (r#"{"list":7}"#, vec![7], r#"{"list":7}"#),
            (r#"{"list":[7]}"#, vec![7], r#"{"list":7}"#),
            (r#"{"list":[7,8]}"#, vec![7, 8], r#"{"list":[7,8]}"#),
        ] {
            let read: Document = serde_json::from_str(text).unwrap();
            assert_eq!(read, Document { list }, "{text}");
            assert_eq!(serde_json::to_string(&read).unwrap(), written);
        }
        for wrong in [r#"{"list":"a"}"#, r#"{"list":[7,"a"]}"#, r#"{"list":{}}"#] {
            assert!(serde_json::from_str::<Document>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn two_of_one_family_are_named() {
        let check = |texts: &[&str]| one_of_each_family(texts.iter().map(|text| text.parse().unwrap()));
        for good in [&[][..], &["10.0.0.1"], &["fd00::1", "10.0.0.1"]] {
            assert_eq!(check(good), Ok(()));
        }
        let said = check(&["10.0.0.1", "fd00::1", "fd00::2"]).unwrap_err();
        assert_eq!(
            said,
            "fd00::1 and fd00::2 are both IPv6: one of each family is taken"
        );
        assert!(check(&["10.0.0.1", "10.0.0.1"]).is_err());
    }
}
