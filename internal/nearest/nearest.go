// Package nearest finds the name that a misspelt word probably means.
package nearest

import "slices"

// Of returns the name in the given list that is most similar to the given word: the fewest edits
// turn the word into this name. If several names are equally similar, it returns the first of them.
// The list must not be empty.
func Of(word string, names []string) string {
	return slices.MinFunc(names, func(a, b string) int { return edits(word, a) - edits(word, b) })
}

// Near returns the same name as Of. ok says whether the given word may be a misspelling of this
// name. ok is false if more than two edits are needed to turn the word into the name. For a name of
// up to four bytes, ok is false if more than one edit is needed.
func Near(word string, names []string) (name string, ok bool) {
	name = Of(word, names)
	most := 2
	if len(name) <= 4 {
		most = 1
	}
	return name, edits(word, name) <= most
}

// The function edits returns the number of edits that turn a into b. An edit inserts, deletes or
// replaces a byte, or swaps two adjacent bytes. (This is the optimal string alignment distance.)
func edits(a, b string) int {
	var before []int // row i-2 of the table of distances
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
