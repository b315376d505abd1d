package vsphere

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/internal/nearest"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// List returns the descriptions of the VMs that the pattern names, sorted by path. The pattern is
// one of these:
//
//   - "": all VMs.
//   - A name, or a path such as "/DATACENTER/vm/FOLDER/NAME". The datacenter, or the datacenter and
//     the folder "vm", may be left out.
//   - A name or a path in which "*", "?" and "[...]" are special, as in package path. In a path,
//     these do not match a "/".
//   - "moref=" and a managed object reference, or "uuid=" and an instance UUID or a BIOS UUID.
//
// A VM whose name or path is equal to the pattern takes precedence over VMs whose name or path differs
// in the case of letters. These take precedence over VMs that match the special characters. The
// special characters always ignore the case of letters, so that the result does not depend on
// which other VMs there are. In names, "/", "\" and "%" may be typed as they are or as "%2f", "%5c" and
// "%25".
//
// A pattern with special characters may name no VM. Any other text that names no VM is a usage
// error. Reasons of shared disks have the names of the other VMs only if the result has all VMs.
func (s *Session) List(ctx context.Context, pattern string) ([]*inventory.VM, error) {
	found, err := s.locateAll(ctx, pattern)
	if err != nil {
		return nil, err
	}
	vms, err := s.describePages(ctx, found)
	if err != nil {
		return nil, explain("cannot list the VMs", err)
	}
	if len(found.chosen) == len(found.refs) && found.complete {
		inventory.NameSharers(vms)
	}
	slices.SortFunc(vms, func(a, b *inventory.VM) int {
		return slices.Compare([]string{a.Path, a.Moref}, []string{b.Path, b.Moref})
	})
	return vms, nil
}

// locateAll searches for the VMs that a pattern names, as List describes.
func (s *Session) locateAll(ctx context.Context, pattern string) (*located, error) {
	found, err := s.locate(ctx, pattern, true)
	if err != nil || len(found.chosen) > 0 || pattern == "" {
		return found, err
	}
	if !hasGlob(pattern) {
		return nil, found.none()
	}
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, usage.Errorf("the pattern %q is malformed", pattern)
	}
	return found, nil
}

// describePages describes the chosen VMs. The result is in no order, and has no VM that was removed
// meanwhile.
func (s *Session) describePages(ctx context.Context, found *located) ([]*inventory.VM, error) {
	var vms []*inventory.VM
	err := s.eachPage(ctx, found, vmProperties, func(ctx context.Context, content []types.ObjectContent) error {
		described, err := s.describeAll(ctx, content, found.known)
		vms = append(vms, described...)
		return err
	})
	return vms, err
}

// eachPage asks for properties of the chosen VMs in pages. It calls f with each page, one after the
// other.
func (s *Session) eachPage(ctx context.Context, found *located, properties []string, f func(ctx context.Context, content []types.ObjectContent) error) error {
	var mu sync.Mutex // while f runs
	pages, ctx := errgroup.WithContext(ctx)
	pages.SetLimit(parallelPages)
	for page := range slices.Chunk(found.chosen, pageSize) {
		pages.Go(func() error {
			var refs []types.ManagedObjectReference
			for _, i := range page {
				refs = append(refs, found.refs[i])
			}
			content, err := s.retrieve(ctx, objectSpecs(refs...), []types.PropertySpec{{Type: "VirtualMachine", PathSet: properties}})
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			return f(ctx, content)
		})
	}
	return pages.Wait()
}

// Find returns the VM that the given text names. The text is a name, a path, a "moref=" or a "uuid=",
// as for List. Special characters of patterns have no meaning. If the text names no VM or several
// VMs, the error is a usage error, which lists the VMs that the user may have meant.
func (s *Session) Find(ctx context.Context, name string) (*VM, error) {
	if name == "" {
		return nil, usage.Errorf("the name of the VM is empty")
	}
	found, err := s.locate(ctx, name, false)
	if err != nil {
		return nil, err
	}
	switch len(found.chosen) {
	case 0:
		return nil, found.none()
	case 1:
		i := found.chosen[0]
		return &VM{session: s, moref: found.refs[i].Value, name: found.places[i].name}, nil
	}
	return nil, found.several()
}

// located is the result of a search for VMs.
type located struct {
	query    query
	server   string
	refs     []types.ManagedObjectReference
	places   []*place // of refs
	chosen   []int    // indexes of the VMs that the query names
	known    *tables  // has the folders in which the VMs lie
	complete bool     // refs has all VMs of the server
}

// placeProperties are the properties from which the place of a VM is made.
var placeProperties = types.PropertySpec{Type: "VirtualMachine", PathSet: []string{"name", "parent", "parentVApp"}}

// locate searches for the VMs that the text names.
func (s *Session) locate(ctx context.Context, text string, globs bool) (*located, error) {
	q, err := parseQuery(text)
	if err != nil {
		return nil, err
	}
	found := &located{query: q, server: s.address(), known: newTables()}
	var content []types.ObjectContent
	switch {
	case q.moref != "":
		content, err = s.retrieveUpwards(ctx, []types.ManagedObjectReference{{Type: "VirtualMachine", Value: q.moref}}, []types.PropertySpec{placeProperties})
	case q.uuid != "":
		var refs []types.ManagedObjectReference
		if refs, err = s.findUUID(ctx, q.uuid); err == nil && len(refs) > 0 {
			content, err = s.retrieveUpwards(ctx, refs, []types.PropertySpec{placeProperties})
		}
	default:
		found.complete = true
		content, err = s.retrieveAll(ctx, append(slices.Clone(folderProperties), placeProperties))
	}
	if err != nil {
		return nil, explain("cannot search for VMs", err)
	}
	found.known.addAll(content, s.client.ServiceContent.RootFolder)
	for _, object := range content {
		if object.Obj.Type == "VirtualMachine" {
			values := properties(object)
			p := found.known.place(property[string](values, "name"), reference(values, "parent"), reference(values, "parentVApp"))
			found.refs, found.places = append(found.refs, object.Obj), append(found.places, p)
		}
	}
	if found.complete && text != "" {
		found.chosen = q.choose(found.places, globs)
	} else {
		for i := range found.refs {
			found.chosen = append(found.chosen, i)
		}
	}
	return found, nil
}

// findUUID returns the VMs with the given instance UUID or, if there is none, with the given BIOS
// UUID. Several VMs can have the same BIOS UUID.
func (s *Session) findUUID(ctx context.Context, uuid string) ([]types.ManagedObjectReference, error) {
	for _, instance := range []bool{true, false} {
		answer, err := methods.FindAllByUuid(ctx, s.client, &types.FindAllByUuid{
			This:         *s.client.ServiceContent.SearchIndex,
			Uuid:         uuid,
			VmSearch:     true,
			InstanceUuid: &instance,
		})
		if err != nil {
			return nil, err
		}
		if len(answer.Returnval) > 0 {
			return answer.Returnval, nil
		}
	}
	return nil, nil
}

// describeAll describes the VMs in an answer of the server. It asks for the objects that they refer
// to and that known does not have.
func (s *Session) describeAll(ctx context.Context, content []types.ObjectContent, known *tables) ([]*inventory.VM, error) {
	var loaded []*mo.VirtualMachine
	var others []types.ManagedObjectReference
	for _, object := range content {
		if object.Obj.Type != "VirtualMachine" {
			continue
		}
		vm, err := loadVM(object)
		if err != nil {
			return nil, err
		}
		loaded = append(loaded, vm)
		others = append(others, othersOf(vm)...)
	}
	if err := known.complete(ctx, s, others); err != nil {
		return nil, err
	}
	var vms []*inventory.VM
	for _, vm := range loaded {
		vms = append(vms, describe(vm, known))
	}
	return vms, nil
}

// none returns the error for a text that names no VM.
func (l *located) none() error {
	message := fmt.Sprintf("no VM on the server %s is named %q", printable.Name(l.server), l.query.text)
	switch {
	case l.query.moref != "":
		message = fmt.Sprintf("no VM on the server %s has the moref %q", printable.Name(l.server), l.query.moref)
	case l.query.uuid != "":
		message = fmt.Sprintf("no VM on the server %s has the UUID %q", printable.Name(l.server), l.query.uuid)
	case len(l.refs) == 0:
		return usage.New(message, "the user of this session sees no VM at all: check the permissions of the user")
	case hasGlob(l.query.text):
		return usage.New(message, "this command needs the name of one VM; list the VMs with: vddkcp ls "+printable.Word(l.query.text))
	}
	if near := l.nearest(); len(near) > 0 {
		return usage.New(message, "did you mean "+strings.Join(near, " or ")+"?")
	}
	return usage.New(message, "list the VMs with: vddkcp ls")
}

// nearest returns up to three VMs whose names are similar to the text that the user has typed.
func (l *located) nearest() []string {
	word := l.query.text
	if l.query.path != nil {
		word = l.query.path[len(l.query.path)-1]
	}
	var names, near []string
	for _, p := range l.places {
		names = append(names, p.name)
	}
	for len(near) < 3 && len(names) > 0 {
		name, ok := nearest.Near(word, names)
		if !ok {
			break
		}
		for _, p := range l.places {
			if p.name == name && len(near) < 3 {
				suggestion := printable.Name(p.name)
				if l.query.path != nil || strings.ContainsAny(name, "/") {
					suggestion = printable.Name(p.String())
				}
				near = append(near, suggestion)
			}
		}
		names = slices.DeleteFunc(names, func(n string) bool { return n == name })
	}
	return near
}

// several returns the error for a text that names several VMs where one is needed.
func (l *located) several() error {
	const most = 10
	var lines []string
	for _, i := range l.chosen {
		lines = append(lines, fmt.Sprintf("%s (moref=%s)", printable.Name(l.places[i].String()), l.refs[i].Value))
	}
	slices.Sort(lines)
	list := strings.Join(lines[:min(len(lines), most)], ", ")
	if len(lines) > most {
		list += fmt.Sprintf(" and %d more", len(lines)-most)
	}
	return usage.New(fmt.Sprintf("%q names %d VMs: %s", l.query.text, len(l.chosen), list), "name the VM by its path or by its moref")
}
