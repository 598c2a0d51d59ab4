/// Watches generated text for strings that end the generation.
///
/// Text is released as soon as it can no longer become part of a stop string. The generation stops at the first
/// position where a stop string is complete; of several that end there, the longest counts. That position depends on
/// the text alone, not on how it was cut into pieces.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    longest: usize,
    /// The end of the text so far, as long as a stop string may have begun in it.
    held: String,
    stopped_by: Option<usize>,
}

impl StopStrings {
    /// Watches for `stops`; empty ones never occur.
    pub fn new(stops: Vec<String>) -> Self {
        let stops: Vec<String> = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        StopStrings { stops, longest, held: String::new(), stopped_by: None }
    }

    /// Takes the next piece of text and returns what is certain now. Nothing comes after the stop.
    pub fn push(&mut self, piece: &str) -> String {
        if self.is_stopped() {
            return String::new();
        }
        let unchecked = self.held.len();
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if let Some((start, stop)) = self.first_stop(&text, unchecked) {
            self.stopped_by = Some(stop);
            text.truncate(start);
            return text;
        }
        let certain = self.first_possible_stop(&text);
        self.held = text.split_off(certain);
        text
    }

    /// Whether a stop string was seen.
    pub fn is_stopped(&self) -> bool {
        self.stopped_by.is_some()
    }

    /// The stop string that was seen.
    pub fn stopped_by(&self) -> Option<&str> {
        self.stopped_by.map(|stop| self.stops[stop].as_str())
    }

    /// The text that was held back, once no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start and number of the stop string with the smallest end after byte `unchecked`.
    fn first_stop(&self, text: &str, unchecked: usize) -> Option<(usize, usize)> {
        let ends = text[unchecked..].char_indices().map(|(at, character)| unchecked + at + character.len_utf8());
        ends.into_iter().find_map(|end| {
            let ending = self.stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
            ending.map(|(number, stop)| (end - stop.len(), number)).min()
        })
    }

    /// The smallest position from which the text is the beginning of a stop string; the end of the text if there is
    /// none.
    fn first_possible_stop(&self, text: &str) -> usize {
        let nearest = text.len().saturating_sub(self.longest.saturating_sub(1));
        (nearest..text.len())
            .filter(|&start| text.is_char_boundary(start))
            .find(|&start| self.stops.iter().any(|stop| stop.starts_with(&text[start..])))
            .unwrap_or(text.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pieces as they come out, the text before the stop, and the stop.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, Option<String>) {
        let mut watch = StopStrings::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut out: Vec<String> = pieces.iter().map(|piece| watch.push(piece)).collect();
        out.push(watch.finish());
        let text = out.concat();
        (out, text, watch.stopped_by().map(str::to_owned))
    }

    #[test]
    fn without_stops_everything_passes_at_once() {
        let (out, _, stop) = run(&[], &["a", "", "ümlaut"]);
        assert_eq!(out, ["a", "", "ümlaut", ""]);
        assert_eq!(stop, None);
        assert_eq!(run(&[""], &["a"]).1, "a", "an empty stop string never occurs");
    }

    #[test]
    fn only_the_possible_prefix_is_held() {
        let (out, _, stop) = run(&["\nUser:"], &["Hello\n", "Us", "ual\nUser", "s"]);
        assert_eq!(out, ["Hello", "", "\nUsual", "\nUsers", ""]);
        assert_eq!(stop, None);
        assert_eq!(run(&["END"], &["the E", "N"]).0, ["the ", "", "EN"]);
    }

    #[test]
    fn a_stop_across_pieces_is_found_and_not_emitted() {
        let (out, text, stop) = run(&["</s>"], &["good<", "/", "s", "> more", "and more"]);
        assert_eq!(text, "good");
        assert_eq!(out[4], "");
        assert_eq!(stop.as_deref(), Some("</s>"));
    }

    #[test]
    fn a_prefix_that_restarts_inside_itself_is_not_lost() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]).1, "a");
        assert_eq!(run(&["abab!"], &["ababab!"]).1, "ab");
    }

    #[test]
    fn overlapping_stops_the_first_to_end_wins_whatever_the_pieces() {
        for pieces in [&["xabcd"][..], &["x", "a", "b", "c", "d"], &["xab", "cd"]] {
            let (_, text, stop) = run(&["abcd", "bc"], pieces);
            assert_eq!((text.as_str(), stop.as_deref()), ("xa", Some("bc")));
            let (_, text, stop) = run(&["c", "abc"], pieces);
            assert_eq!((text.as_str(), stop.as_deref()), ("x", Some("abc")));
        }
    }

    #[test]
    fn multi_byte_characters_are_never_cut() {
        // "é" and "è" share their first byte.
        assert_eq!(run(&["né."], &["n", "è", "né", "."]).1, "nè");
        assert_eq!(run(&["🤖🤖"], &["🤖", "🦾🤖", "🤖x"]).1, "🤖🦾");
    }

    /// The definition, on the whole text.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        for end in 0..=text.len() {
            if text.is_char_boundary(end) {
                let ending = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
                if let Some(longest) = ending.map(String::len).max() {
                    return (text[..end - longest].to_owned(), true);
                }
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn equals_the_naive_search(
            stops in prop::collection::vec("[abé🤖]{0,4}", 0..4),
            pieces in prop::collection::vec("[abcé🤖]{0,5}", 0..12),
        ) {
            let mut watch = StopStrings::new(stops.clone());
            let mut text = String::new();
            let mut fed = String::new();
            for piece in &pieces {
                text.push_str(&watch.push(piece));
                fed.push_str(piece);
                if !watch.is_stopped() {
                    // What is held back is the beginning of a stop string, and nothing longer than that.
                    let held = fed.strip_prefix(text.as_str()).unwrap();
                    prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
                }
            }
            text.push_str(&watch.finish());
            prop_assert_eq!((text, watch.is_stopped()), naive(&stops, &pieces.concat()));
        }
    }
}
