package main

import (
	"fmt"
	"strings"
)

// maxParagraph is the largest number of lines that a paragraph may have.
const maxParagraph = 6

// lintMarkdown checks the text of a Markdown page. It ignores fenced blocks and code between
// backquotes.
func lintMarkdown(path, text string) (problems []problem, err error) {
	fenced := false
	var paragraph []string
	first := 0
	end := func() {
		if len(paragraph) > maxParagraph {
			problems = append(problems, problem{path, first, fmt.Sprintf("the paragraph has %d lines, more than %d: give each subject a paragraph of its own", len(paragraph), maxParagraph)})
		}
		for _, found := range phrasesIn(plain(strings.Join(paragraph, " "))) {
			problems = append(problems, problem{path, first, "the page has " + found})
		}
		paragraph = nil
	}
	for i, line := range strings.Split(text, "\n") {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "```") {
			fenced = !fenced
		}
		if fenced || trimmed == "" || strings.HasPrefix(trimmed, "```") {
			end()
			continue
		}
		if strings.HasPrefix(trimmed, "|") || strings.HasPrefix(trimmed, "- ") || strings.HasPrefix(trimmed, "* ") {
			end() // a row of a table or an item of a list is a paragraph
		}
		if len(paragraph) == 0 {
			first = i + 1
		}
		paragraph = append(paragraph, withoutCode(trimmed))
	}
	end()
	return problems, nil
}

// withoutCode returns a line without the code between backquotes.
func withoutCode(line string) string {
	parts := strings.Split(line, "`")
	var prose []string
	for i := 0; i < len(parts); i += 2 {
		prose = append(prose, parts[i])
	}
	return strings.Join(prose, "x")
}
