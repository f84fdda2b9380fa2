//! For tests: a value and its JSON schema name the same fields.

use serde_json::Value;

/// Panics unless every field that is written is in the schema and required there, and the other way round.
pub(crate) fn compare(schema: &Value, definition: &Value, value: &Value, path: &str) {
    let definition = match definition.get("$ref").and_then(Value::as_str) {
        Some(name) => &schema["$defs"][name.trim_start_matches("#/$defs/")],
        None => definition,
    };
    if let Some(variants) = definition.get("anyOf").and_then(Value::as_array) {
        let fits = variants
            .iter()
            .find(|variant| (variant["type"] == "null") == value.is_null())
            .expect(path);
        return compare(schema, fits, value, path);
    }
    let allowed = |value: &Value| {
        definition
            .get("enum")
            .is_none_or(|known| known.as_array().expect(path).contains(value))
    };
    assert!(allowed(value), "{path}: {value} is not in the schema");
    let kind = |name: &str| assert_eq!(definition["type"], name, "{path}");
    match value {
        Value::Object(object) => {
            let keys: Vec<&String> = object.keys().collect();
            let mut known: Vec<&String> = definition["properties"].as_object().expect(path).keys().collect();
            let required = definition["required"].as_array().expect(path).iter();
            let mut required: Vec<&str> = required.map(|key| key.as_str().expect(path)).collect();
            known.sort();
            required.sort_unstable();
            assert_eq!(keys, known, "{path}: fields and properties");
            assert_eq!(keys, required, "{path}: fields and required");
            assert_eq!(definition["additionalProperties"], false, "{path}");
            for (key, inner) in object {
                compare(
                    schema,
                    &definition["properties"][key],
                    inner,
                    &format!("{path}.{key}"),
                );
            }
        }
        Value::Array(elements) => {
            kind("array");
            elements
                .iter()
                .for_each(|element| compare(schema, &definition["items"], element, path));
        }
        Value::String(_) => kind("string"),
        Value::Number(_) => kind("integer"),
        Value::Null => kind("null"),
        Value::Bool(_) => kind("boolean"),
    }
}
