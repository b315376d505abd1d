package vspheretest

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

// command is a command that scripts and users give to a server.
type command struct {
	usage    string
	min, max int // number of arguments
	run      func(s *Server, args []string) string
}

// commands are the commands of [Server.Command]. Each returns the text to print.
var commands = map[string]command{
	"end-sessions":      {"", 0, 0, func(s *Server, a []string) string { s.EndSessions(); return "" }},
	"renew-certificate": {"", 0, 0, func(s *Server, a []string) string { s.RenewCertificate(); return s.Thumbprint() + "\n" }},
	"restart":           {"", 0, 0, func(s *Server, a []string) string { s.Restart(); return "" }},
	"stop":              {"", 0, 0, func(s *Server, a []string) string { s.Stop(); return "" }},
	"resume":            {"", 0, 0, func(s *Server, a []string) string { s.Resume(); return "" }},
	"cut":               {"", 0, 0, func(s *Server, a []string) string { s.CutConnections(); return "" }},
	"settle":            {"", 0, 0, func(s *Server, a []string) string { s.Settle(); return "" }},
	"sessions":          {"", 0, 0, func(s *Server, a []string) string { return lines(s.Sessions()) }},
	"calls":             {"[METHOD]", 0, 1, printCalls},
	"snapshots":         {"VM", 1, 1, printSnapshots},
	"descriptions":      {"VM", 1, 1, printDescriptions},
	"files":             {"VM", 1, 1, func(s *Server, a []string) string { return lines(s.Files(a[0])) }},
	"moref":             {"VM", 1, 1, func(s *Server, a []string) string { return s.Find(a[0]).Value + "\n" }},
	"image":             {"VM N", 2, 2, func(s *Server, a []string) string { return s.Image(a[0], number(a[1])) + "\n" }},
	"write": {"VM N OFFSET TEXT", 4, 4, func(s *Server, a []string) string {
		s.Write(a[0], number(a[1]), []byte(a[3]), size(a[2]))
		return ""
	}},
	"snapshot":         {"VM NAME [DESCRIPTION]", 2, 3, func(s *Server, a []string) string { s.AddSnapshot(a[0], a[1], at(a, 2)); return "" }},
	"remove-snapshots": {"VM [NAME]", 1, 2, func(s *Server, a []string) string { s.RemoveSnapshotBehindBack(a[0], at(a, 1)); return "" }},
	"revert":           {"VM NAME", 2, 2, func(s *Server, a []string) string { s.Revert(a[0], a[1]); return "" }},
	"keep-files":       {"VM", 1, 1, func(s *Server, a []string) string { s.KeepFiles(a[0]); return "" }},
	"consolidation":    {"VM", 1, 1, func(s *Server, a []string) string { s.NeedConsolidation(a[0]); return "" }},
	"quiesce-fails":    {"VM [FAULT]", 1, 2, func(s *Server, a []string) string { s.QuiesceFails(a[0], faultOf(at(a, 1))); return "" }},
	"task":             {"VM NAME", 2, 2, func(s *Server, a []string) string { s.StartTask(a[0], a[1]); return "" }},
	"poweroff":         {"VM", 1, 1, func(s *Server, a []string) string { s.PowerOff(a[0]); return "" }},
	"poweron":          {"VM", 1, 1, func(s *Server, a []string) string { s.PowerOn(a[0]); return "" }},
	"suspend":          {"VM", 1, 1, func(s *Server, a []string) string { s.Suspend(a[0]); return "" }},
	"rename":           {"VM NAME", 2, 2, func(s *Server, a []string) string { s.Rename(a[0], a[1]); return "" }},
	"move":             {"VM HOST", 2, 2, func(s *Server, a []string) string { s.MoveHost(a[0], a[1]); return "" }},
	"move-datastore":   {"VM DATASTORE", 2, 2, func(s *Server, a []string) string { s.MoveDatastore(a[0], a[1]); return "" }},
	"destroy":          {"VM", 1, 1, func(s *Server, a []string) string { s.Destroy(a[0]); return "" }},
	"question":         {"VM [TEXT]", 1, 2, func(s *Server, a []string) string { s.Question(a[0], at(a, 1)); return "" }},
	"fill":             {"DATASTORE FREE", 2, 2, func(s *Server, a []string) string { s.FillDatastore(a[0], size(a[1])); return "" }},
	"revoke":           {"PRIVILEGE", 1, 1, func(s *Server, a []string) string { s.RevokePrivilege(a[0]); return "" }},
	"grant":            {"PRIVILEGE", 1, 1, func(s *Server, a []string) string { s.GrantPrivilege(a[0]); return "" }},

	"nfc-stats":      {"[HOST]", 0, 1, func(s *Server, a []string) string { return fmt.Sprintf("%+v\n", s.NFC(at(a, 0)).Stats()) }},
	"nfc-violations": {"[HOST]", 0, 1, func(s *Server, a []string) string { return lines(s.NFC(at(a, 0)).Violations()) }},
	"nfc-cut":        {"[HOST]", 0, 1, func(s *Server, a []string) string { s.NFC(at(a, 0)).Cut(); return "" }},
	"nfc-expire":     {"[HOST]", 0, 1, func(s *Server, a []string) string { s.NFC(at(a, 0)).ExpireTickets(); return "" }},
	"nfc-renew":      {"[HOST]", 0, 1, func(s *Server, a []string) string { s.NFC(at(a, 0)).RenewCertificate(); return "" }},

	"fault":   {"METHOD [soap=TYPE] [task=TYPE] [status=N] [cut=before|after] [truncate] [hang] [late] [hangtask] [times=N] [skip=N] [vm=NAME] [body=TEXT]", 1, -1, addFault},
	"clear":   {"", 0, 0, func(s *Server, a []string) string { s.ClearFaults(); return "" }},
	"release": {"[METHOD]", 0, 1, release},
}

// Command runs a command, such as "snapshots web01", and returns its output. Usage lists the
// commands. A fault TYPE is the name of a type of the API and may set fields that are text:
// "NoPermission,PrivilegeId=VirtualMachine.State.CreateSnapshot".
func (s *Server) Command(args ...string) (output string, err error) {
	if len(args) == 0 {
		return "", fmt.Errorf("no command; want one of:\n%s", Usage())
	}
	c, ok := commands[args[0]]
	if !ok {
		return "", fmt.Errorf("no command is called %q; want one of:\n%s", args[0], Usage())
	}
	if n := len(args) - 1; n < c.min || c.max >= 0 && n > c.max {
		return "", fmt.Errorf("usage: %s %s", args[0], c.usage)
	}
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%s: %v", args[0], r)
		}
	}()
	return c.run(s, args[1:]), nil
}

// Usage returns a line for each command.
func Usage() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(commands)) {
		fmt.Fprintf(&b, "%s\n", strings.TrimSpace(name+" "+commands[name].usage))
	}
	return b.String()
}

func lines[T any](list []T) string {
	var b strings.Builder
	for _, v := range list {
		fmt.Fprintln(&b, v)
	}
	return b.String()
}

// at returns an argument; "": there are fewer.
func at(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return ""
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		panic(err)
	}
	return n
}

func size(text string) int64 {
	n, err := bytesize.Parse(text)
	if err != nil {
		panic(err)
	}
	return n
}

func printCalls(s *Server, args []string) string {
	calls := s.Calls()
	if len(args) == 1 {
		return fmt.Sprintln(calls[args[0]])
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		fmt.Fprintf(&b, "%d %s\n", calls[name], name)
	}
	return b.String()
}

// printSnapshots shows the tree of a VM: children are indented below their parents.
func printSnapshots(s *Server, args []string) string {
	var b strings.Builder
	for _, e := range s.Snapshots(args[0]) {
		fmt.Fprintf(&b, "%s%s\n", strings.Repeat("  ", e.Depth), e.Name)
	}
	return b.String()
}

func printDescriptions(s *Server, args []string) string {
	var b strings.Builder
	for _, e := range s.Snapshots(args[0]) {
		fmt.Fprintf(&b, "%s: %s\n", e.Name, e.Description)
	}
	return b.String()
}

// faultOf returns a fault by the name of its type. A name may be followed by fields that are set,
// as in "NoPermission,PrivilegeId=X".
func faultOf(text string) types.BaseMethodFault {
	if text == "" {
		return nil
	}
	words := strings.Split(text, ",")
	kind, ok := types.TypeFunc()(words[0])
	if !ok {
		panic(fmt.Sprintf("the API has no type %q", words[0]))
	}
	value := reflect.New(kind)
	for _, w := range words[1:] {
		name, field, _ := strings.Cut(w, "=")
		f := value.Elem().FieldByName(name)
		if !f.IsValid() || f.Kind() != reflect.String {
			panic(fmt.Sprintf("%s has no field %q that is text", words[0], name))
		}
		f.SetString(field)
	}
	fault, ok := value.Interface().(types.BaseMethodFault)
	if !ok {
		panic(fmt.Sprintf("%s is not a fault", words[0]))
	}
	return fault
}

func addFault(s *Server, args []string) string {
	v := newValues(args[1:])
	f := Fault{
		Soap: faultOf(v.text("soap")), Task: faultOf(v.text("task")), Status: v.number("status"), Truncate: v.yes("truncate"),
		Hang: v.yes("hang"), Late: v.yes("late"), HangTask: v.yes("hangtask"), Times: v.number("times"), Skip: v.number("skip"), VM: v.text("vm"),
	}
	if text := v.text("body"); text != "" {
		f.Where = func(c Call) bool { return strings.Contains(c.Body, text) }
	}
	switch cut := v.text("cut"); cut {
	case "before":
		f.Cut = Before
	case "after":
		f.Cut = After
	case "":
	default:
		panic(fmt.Sprintf("cut=%s: want before or after", cut))
	}
	if err := v.end(); err != nil {
		panic(err)
	}
	s.On(args[0], f)
	return ""
}

// Rule returns the newest rule for a method; nil: there is none.
func (s *Server) Rule(method string) *Rule {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range slices.Backward(s.rules) {
		if r.method == method {
			return r
		}
	}
	return nil
}

func release(s *Server, args []string) string {
	s.mu.Lock()
	rules := slices.Clone(s.rules)
	s.mu.Unlock()
	for _, r := range rules {
		if len(args) == 0 || r.method == args[0] {
			r.Release()
		}
	}
	return ""
}
