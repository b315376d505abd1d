package vsphere

import (
	"path"
	"strings"

	"github.com/vddkcp/vddkcp/internal/usage"
)

var (
	nameEncoder = strings.NewReplacer("%", "%25", "/", "%2f", `\`, "%5c")
	nameDecoder = strings.NewReplacer("%25", "%", "%2f", "/", "%2F", "/", "%5c", `\`, "%5C", `\`)
)

// encodeName returns a name as vSphere stores it: "/", "\" and "%" are escape sequences.
func encodeName(name string) string { return nameEncoder.Replace(name) }

// decodeName returns the name that vSphere stores as the given text. Only the escape sequences that
// encodeName writes are decoded, with hexadecimal digits of either case.
func decodeName(text string) string { return nameDecoder.Replace(text) }

// sameName reports whether a text that a user has typed is the given name, which is not encoded. The
// text may be encoded.
func sameName(text, name string) bool {
	return text == name || decodeName(text) == name
}

// foldName is like sameName but does not distinguish upper case from lower case.
func foldName(text, name string) bool {
	return strings.EqualFold(text, name) || strings.EqualFold(decodeName(text), name)
}

// globName reports whether the name matches the pattern, in which "*", "?" and "[...]" are special.
// It does not distinguish upper case from lower case. The special characters also match a "/" in
// the name.
func globName(pattern, name string) bool {
	for _, p := range []string{pattern, decodeName(pattern)} {
		// In package path, "*" and "?" do not match "/". No name contains a NUL.
		p, n := strings.ReplaceAll(p, "/", "\x00"), strings.ReplaceAll(name, "/", "\x00")
		if ok, _ := path.Match(strings.ToLower(p), strings.ToLower(n)); ok {
			return true
		}
	}
	return false
}

// hasGlob reports whether the text contains characters that are special in patterns.
func hasGlob(text string) bool { return strings.ContainsAny(text, "*?[") }

// place is where an object lies in the inventory.
type place struct {
	name   string   // decoded
	path   []string // decoded names, from the datacenter or a folder above the datacenter to the object
	center int      // index of the datacenter in the path; -1: unknown
}

// String returns the path, in which the names are encoded.
func (p *place) String() string {
	var b strings.Builder
	for _, name := range p.path {
		b.WriteString("/" + encodeName(name))
	}
	return b.String()
}

// folder returns the path of the folder of the VM, relative to the folder "vm" of the datacenter.
// The names are encoded.
func (p *place) folder() string {
	forms := p.forms()
	names := forms[len(forms)-1]
	return strings.TrimPrefix((&place{path: names[:len(names)-1]}).String(), "/")
}

// forms returns the paths by which users may name the VM: from the top of the inventory, from the
// datacenter, without the datacenter, and relative to the folder "vm" of the datacenter.
func (p *place) forms() [][]string {
	forms := [][]string{p.path}
	if p.center < 0 {
		return forms
	}
	for _, n := range []int{p.center, p.center + 1, p.center + 2} {
		if n > 0 && n < len(p.path) {
			forms = append(forms, p.path[n:])
		}
	}
	return forms
}

// query is what a user has typed to name VMs.
type query struct {
	text  string
	moref string
	uuid  string
	path  []string // names of a path; nil: text is a name
}

// parseQuery splits the text by which a user names VMs. The empty text means all VMs.
func parseQuery(text string) (query, error) {
	q := query{text: text}
	kind, value, hasValue := strings.Cut(text, "=")
	switch {
	case hasValue && (kind == "moref" || kind == "uuid"):
		if value == "" {
			return query{}, usage.Errorf("%q names no VM: the value after the \"=\" is missing", text)
		}
		if kind == "moref" {
			q.moref = strings.TrimPrefix(value, "VirtualMachine:")
		} else {
			q.uuid = strings.ToLower(value)
		}
	case strings.Contains(text, "/"):
		q.path = strings.Split(strings.Trim(text, "/"), "/")
	}
	return q, nil
}

// matches reports whether the query names the VM at the given place. The function same compares one
// name of the query with one name of the inventory.
func (q *query) matches(p *place, same func(text, name string) bool) bool {
	if same(q.text, p.name) {
		return true
	}
	if q.path == nil {
		return false
	}
	for _, form := range p.forms() {
		if len(form) != len(q.path) {
			continue
		}
		all := true
		for i := range form {
			all = all && same(q.path[i], form[i])
		}
		if all {
			return true
		}
	}
	return false
}

// choose returns the indexes of the places that the query names. A place whose name or path is equal
// to the query takes precedence over one that differs in the case of letters only, and over one that
// matches the query as a pattern. Patterns are used only if globs is true.
func (q *query) choose(places []*place, globs bool) []int {
	comparisons := []func(text, name string) bool{sameName, foldName}
	if globs && hasGlob(q.text) {
		comparisons = append(comparisons, globName)
	}
	for _, same := range comparisons {
		var found []int
		for i, p := range places {
			if q.matches(p, same) {
				found = append(found, i)
			}
		}
		if found != nil {
			return found
		}
	}
	return nil
}

// splitFile splits the name of a file, such as "[DATASTORE] DIR/DISK.vmdk", into the name of the
// datastore and the path in the datastore. Names of datastores may contain "] ", so the names of
// known datastores take precedence.
func splitFile(file string, datastores ...string) (datastore, rest string, ok bool) {
	inner, ok := strings.CutPrefix(file, "[")
	if !ok {
		return "", "", false
	}
	for _, name := range datastores {
		for _, written := range []string{name, encodeName(name)} {
			if rest, ok := strings.CutPrefix(inner, written+"]"); ok && written != "" && (rest == "" || rest[0] == ' ') {
				return name, strings.TrimPrefix(rest, " "), true
			}
		}
	}
	if datastore, rest, ok = strings.Cut(inner, "] "); ok {
		return decodeName(datastore), rest, true
	}
	if datastore, ok = strings.CutSuffix(inner, "]"); ok {
		return decodeName(datastore), "", true
	}
	return "", "", false
}
