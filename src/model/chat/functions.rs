//! What transformers adds to Jinja2 for chat templates: `raise_exception`, `strftime_now`, and a `tojson`
//! that writes what Python writes.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::Formatter;

/// Marks an error that a template raised itself.
pub(super) const RAISED: &str = "raised: ";

/// Adds the functions and the filter, and prints constants as Python does.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, state, value| match (value.kind(), value.is_true()) {
        (ValueKind::None, _) => out.write_str("None").map_err(Error::from),
        (ValueKind::Bool, true) => out.write_str("True").map_err(Error::from),
        (ValueKind::Bool, false) => out.write_str("False").map_err(Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    environment.add_filter("tojson", |value: Value, options: Kwargs| -> Result<Value, Error> {
        let indent: Option<usize> = options.get("indent")?;
        // Python's `ensure_ascii` is off in transformers; a template that turns it on is refused below.
        if options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "`tojson(ensure_ascii=true)` is not supported",
            ));
        }
        options.assert_all_used()?;
        Ok(Value::from_safe_string(python_json(&value, indent)?))
    });
}

/// Makes `strftime_now` tell the time `unix_seconds`.
pub(super) fn set_clock(environment: &mut Environment<'static>, unix_seconds: i64) {
    environment.add_function("strftime_now", move |format: String| strftime(&format, unix_seconds));
}

/// Seconds since 1970, UTC.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs() as i64)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// C's `strftime` in UTC, for the fields that chat templates print.
fn strftime(format: &str, unix_seconds: i64) -> Result<String, Error> {
    let (day, second) = (unix_seconds.div_euclid(86400), unix_seconds.rem_euclid(86400));
    let (year, month, date) = civil(day);
    let month_name = MONTHS[month - 1];
    let day_name = DAYS[(day + 4).rem_euclid(7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let field = match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year.rem_euclid(100)),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{date:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('%') => "%".to_owned(),
            other => {
                let field = other.map_or_else(String::new, String::from);
                let message = format!(
                    "`strftime_now` does not know `%{field}`, only %Y %y %m %d %B %b %A %a %H %M %S %%"
                );
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
        out.push_str(&field);
    }
    Ok(out)
}

/// Year, month and day of a day since 1970 in the Gregorian calendar: count in eras of 400 years whose
/// years begin in March, so that the leap day comes last.
fn civil(day: i64) -> (i64, usize, i64) {
    let day = day + 719_468;
    let (era, of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let date = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month as usize, date)
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn python_json(value: &Value, indent: Option<usize>) -> Result<String, Error> {
    let mut bytes = Vec::new();
    let formatter = Python { indent, depth: 0, empty: true };
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    let failed = |e: &dyn std::error::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    value.serialize(&mut serializer).map_err(|e| failed(&e))?;
    String::from_utf8(bytes).map_err(|e| failed(&e))
}

/// Separators `, ` and `: `, or one entry per line.
struct Python {
    indent: Option<usize>,
    depth: usize,
    empty: bool,
}

impl Python {
    fn open<W: ?Sized + Write>(&mut self, out: &mut W, sign: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        out.write_all(sign)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, sign: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line(out)?;
        }
        self.empty = false;
        out.write_all(sign)
    }

    fn entry<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(if self.indent.is_some() { b"," } else { b", " })?;
        }
        self.line(out)
    }

    fn line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(out, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }
    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.entry(out, first)
    }
    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }
    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }
    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.entry(out, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| strftime("%A %a %d %B %b %Y %y-%m %H:%M:%S %%", seconds).unwrap();
        assert_eq!(at(0), "Thursday Thu 01 January Jan 1970 70-01 00:00:00 %");
        assert_eq!(at(1_000_000_000), "Sunday Sun 09 September Sep 2001 01-09 01:46:40 %");
        assert_eq!(at(951_782_400), "Tuesday Tue 29 February Feb 2000 00-02 00:00:00 %");
        assert_eq!(at(4_107_542_399), "Sunday Sun 28 February Feb 2100 00-02 23:59:59 %");
        assert_eq!(at(4_107_542_400), "Monday Mon 01 March Mar 2100 00-03 00:00:00 %");
        let e = strftime("%Q", 0).unwrap_err().to_string();
        assert!(e.contains("`%Q`"), "{e}");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let json = serde_json::json!({"a": [1, 2.5, null, true], "b": {"é<>&'": "x\"\n"}, "c": [], "d": {}});
        let value = Value::from(minijinja::value::Serde(&json));
        let flat = r#"{"a": [1, 2.5, null, true], "b": {"é<>&'": "x\"\n"}, "c": [], "d": {}}"#;
        assert_eq!(python_json(&value, None).unwrap(), flat);
        let tall = "{\n  \"a\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"b\": {\n    \"é<>&'\": \"x\\\"\\n\"\n  },\n  \"c\": [],\n  \"d\": {}\n}";
        assert_eq!(python_json(&value, Some(2)).unwrap(), tall);
    }
}
