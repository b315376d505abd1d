// Package nearest finds the name that was meant by one that is misspelt.
package nearest

import "slices"

// Of returns the one of names, of which there is at least one, that the fewest
// edits make of word; of several the first.
func Of(word string, names []string) string {
	return slices.MinFunc(names, func(a, b string) int { return edits(word, a) - edits(word, b) })
}

// Near is Of for a word that may mean something else: it is not ok if word is
// nearer to itself than to a name, that is with more than one edit for names of up
// to four bytes and more than two for longer ones.
func Near(word string, names []string) (name string, ok bool) {
	name = Of(word, names)
	most := 2
	if len(name) <= 4 {
		most = 1
	}
	return name, edits(word, name) <= most
}

// edits is the distance of optimal string alignment, in bytes: insertions,
// deletions, substitutions and swaps of neighbours.
func edits(a, b string) int {
	var before []int // the row for i-2
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			change := row[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			next[j] = min(change, next[j-1]+1, row[j]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
