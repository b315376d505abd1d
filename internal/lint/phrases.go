package main

import (
	"fmt"
	"regexp"
	"strings"
)

// phrases contains regular expressions for phrases that readers of this repository misunderstood,
// or understood only after they had read the code. The field advice of an expression says what to
// write in place of the phrase. CONTRIBUTING.md has examples.
var phrases = []struct {
	pattern *regexp.Regexp
	advice  string
}{
	{regexp.MustCompile(`\b(is|are|was|were|be|been) come to\b`), `"is reached"`},
	{regexp.MustCompile(`\b(is|are|was|were|be|been|being) told of\b`), `who reports what`},
	{regexp.MustCompile(`\bgone on with\b`), `"resumed" or "continued"`},
	{regexp.MustCompile(`(?i)\bbut for\b`), `"except"`},
	{regexp.MustCompile(`(?i)\blest\b`), `"so that ... not"`},
	{regexp.MustCompile(`(?i)\bno file or folder\b`), `"no such file or directory"`},
	{regexp.MustCompile(`(?i)\bwhoever\b`), `the subject by its name`},
	{regexp.MustCompile(`(?i)\bwhat becomes of\b`), `the result by its name`},
	{regexp.MustCompile(`(?i)\bas it were\b`), `the plain statement`},
	// The last two expressions match sentences that begin with Of, Who, Whose or What. A
	// reader does not know the subject of these sentences.
	{regexp.MustCompile(`(^|[.:;] )(Of|Who|Whose) [^?]*?[.,;:]`), `a sentence that begins with its subject`},
	{regexp.MustCompile(`(^|[.] )What [^?]*?([.,;:]|$)`), `a sentence that begins with its subject`},
}

// phrasesIn returns a description of each forbidden phrase in text. The caller has joined the
// lines of the text.
func phrasesIn(text string) (found []string) {
	for _, p := range phrases {
		at := p.pattern.FindString(text)
		if at != "" && !strings.HasPrefix(at, "Of returns ") { // a function can be named Of
			if len(at) > 60 {
				at = at[:60] + "..."
			}
			found = append(found, fmt.Sprintf("%q: write %s", at, p.advice))
		}
	}
	return found
}
