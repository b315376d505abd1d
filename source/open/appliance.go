package open

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/ova"
	"github.com/vddkcp/vddkcp/source/raw"
)

// Manifest is the ability of a disk in an appliance to be verified: its files are
// compared with the manifest, the list of digests in the appliance.
type Manifest interface {
	// VerifyManifest reads the descriptor and all files of the disk completely, and
	// compares their digests with those in the manifest. It returns a *ManifestError if
	// the digest of a file differs. It returns an error that wraps ErrNoManifest if
	// there is no manifest, or if the manifest has no digest of one of the files.
	VerifyManifest(ctx context.Context) error
}

// Warned is the ability of a disk to report faults in spite of which it can be read,
// such as a wrong size in the descriptor of an appliance, or an image that was not
// closed cleanly.
type Warned interface {
	// Warnings returns a sentence for each fault. Each sentence begins with the path of
	// the file that the fault is in.
	Warnings() []string
}

// ManifestError reports a file that differs from its digest in the manifest of an
// appliance.
type ManifestError = ova.ManifestError

// ErrNoManifest means that an appliance has no manifest, or that its manifest has no
// digest of a file that should be verified.
var ErrNoManifest = ova.ErrNoManifest

// DiskEntry describes a disk that the descriptor of an appliance lists.
type DiskEntry struct {
	Number   int    // 1 for the first disk, and so on; #NUMBER after the address selects the disk
	Name     string // diskId; #NAME after the address selects the disk
	File     string // name of the file, relative to the descriptor; "": an empty disk without a file
	System   string // id of the virtual system that uses the disk; "": not recorded
	Format   string // "vmdk", "raw", "qcow2", "vhd" or "vdi"; "": the content of the file decides
	Capacity int64  // virtual size in bytes; 0: not recorded
	Size     int64  // size of the file in bytes; 0: no file, or not known
	Err      error  // why the disk cannot be opened; nil if no reason is known
}

func (e *DiskEntry) String() string {
	capacity := "capacity unknown"
	if e.Capacity > 0 {
		capacity = bytesize.Format(e.Capacity)
	}
	s := fmt.Sprintf("#%d %s (%s", e.Number, printable.Name(e.Name), capacity)
	if e.System != "" {
		s += " of " + printable.Name(e.System)
	}
	return s + ")"
}

// ChoiceError reports an address that does not select one disk of an appliance. Either
// the address does not say which of several disks it means, or the selected disk does
// not exist, or several disks have the selected name.
type ChoiceError struct {
	Path   string      // of the appliance
	Choice string      // the text after #; "" if there is none
	Disks  []DiskEntry // all disks of the appliance
}

// maxListed is the largest number of disks that an error lists.
const maxListed = 32

func (e *ChoiceError) Error() string {
	var list []string
	for i := range e.Disks[:min(len(e.Disks), maxListed)] {
		list = append(list, e.Disks[i].String())
	}
	if more := len(e.Disks) - len(list); more > 0 {
		list = append(list, fmt.Sprintf("and %d more", more))
	}
	all := strings.Join(list, ", ")
	switch {
	case e.Choice == "":
		return fmt.Sprintf("%s has %d disks: %s", e.Path, len(e.Disks), all)
	case e.matches() > 1:
		return fmt.Sprintf("%s has %d disks with the name %s: %s", e.Path, e.matches(), printable.Name(e.Choice), all)
	}
	return fmt.Sprintf("%s has no disk %s; it has %s", e.Path, printable.Name(e.Choice), all)
}

func (e *ChoiceError) matches() int {
	n := 0
	for _, d := range e.Disks {
		if d.hasName(e.Choice) {
			n++
		}
	}
	return n
}

// Hint returns an example of an address that selects a disk.
func (e *ChoiceError) Hint() string {
	return fmt.Sprintf("select a disk by its number or its name: '%s#%d'", e.Path, e.Disks[0].Number)
}

// ExitStatus returns the exit status of a program that ends with this error.
func (*ChoiceError) ExitStatus() int { return exit.Usage }

// hasName reports whether the given name is the name of the disk or of its file.
func (e *DiskEntry) hasName(name string) bool {
	return name != "" && (e.Name == name || e.File == name)
}

// FileOf returns the path of the local file to which an address leads. For a disk in an
// appliance, this is the file of the appliance. The result ok is false if the address
// does not lead to a local file.
func FileOf(a address.Address) (path string, ok bool) {
	switch a := a.(type) {
	case address.Path:
		return string(a), true
	case address.Appliance:
		if _, err := os.Lstat(a.String()); err != nil {
			return a.Path, true
		}
		return a.String(), true
	}
	return "", false
}

// Appliance lists all disks of the appliance at an address, even if the address selects
// one of them. It returns nil if there is no appliance at the address. A disk that
// cannot be opened is listed with its error.
func (o *Opener) Appliance(ctx context.Context, a address.Address) ([]DiskEntry, error) {
	at, ok := a.(address.Appliance)
	if !ok {
		return nil, nil
	}
	path := at.Path
	// The appliance is opened through a second Opener, so that o.Files does not list
	// the files that are opened here only to inspect the appliance.
	appliance, _, err := (&Opener{AllowPath: o.AllowPath}).appliance(ctx, path)
	if err != nil {
		return nil, err
	}
	defer appliance.Close()
	disks := entries(appliance)
	for i := range disks {
		disks[i].Size, disks[i].Err = appliance.Size(ctx, i)
		if disks[i].Err == nil && !isRead(disks[i].Format) {
			disks[i].Err = notRead(path, &disks[i])
		}
	}
	return disks, nil
}

// The method appliance opens an .ova or .ovf file. For an .ovf file it also returns a
// source.Opener, which opens the files that the .ovf file names. For an .ova file the
// returned source.Opener is nil.
func (o *Opener) appliance(ctx context.Context, path string) (a *ova.Appliance, folder source.Opener, err error) {
	f, err := o.openFile(ctx, path)
	if err != nil {
		return nil, nil, err
	}
	if f.Size() == 0 {
		f.Close()
		return nil, nil, &emptyError{path: path}
	}
	if strings.EqualFold(filepath.Ext(path), ".ova") {
		a, err = ova.Open(ctx, path, f)
		return a, nil, err
	}
	folder, err = o.references(f, path, nil)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	a, err = ova.OpenDescriptor(path, f, folder)
	return a, folder, err
}

func entries(a *ova.Appliance) []DiskEntry {
	disks := make([]DiskEntry, len(a.Disks))
	for i := range a.Disks {
		d := &a.Disks[i]
		disks[i] = DiskEntry{
			Number: d.Number, Name: d.Name(), File: d.File, System: d.System,
			Format: formatOf(d.Format), Capacity: d.Capacity,
		}
	}
	return disks
}

// formatOf returns the format to which a URI in a descriptor refers, or "" if the URI
// is not known. Different writers, and different versions of a writer, use different
// URIs.
func formatOf(uri string) string {
	uri = strings.ToLower(uri)
	for _, f := range []struct{ part, format string }{
		{"vmdk", "vmdk"},
		{"qcow", "qcow2"},
		{"wiki/byte", "raw"}, // oVirt
		{"vhd", "vhd"},
		{"bb676673", "vhd"},      // Microsoft
		{"linkid=137171", "vhd"}, // VirtualBox
		{"vdi", "vdi"},
	} {
		if strings.Contains(uri, f.part) {
			return f.format
		}
	}
	return ""
}

func isRead(format string) bool { return format != "vhd" && format != "vdi" }

func notRead(path string, e *DiskEntry) error {
	return fmt.Errorf("%s: the format of disk %s is %s, which vddkcp cannot read: %w", path, printable.Name(e.Name), strings.ToUpper(e.Format), ErrNotRead)
}

// The function pick returns the index of the disk that the user has chosen. The
// parameter choice is the number or the name of this disk. It may be "" if there is
// only one disk.
func pick(path, choice string, disks []DiskEntry) (int, error) {
	if choice == "" {
		if len(disks) == 1 {
			return 0, nil
		}
		return 0, &ChoiceError{path, choice, disks}
	}
	if n, err := strconv.Atoi(choice); err == nil && n >= 1 && n <= len(disks) {
		return n - 1, nil
	}
	found := -1
	for i := range disks {
		if disks[i].hasName(choice) {
			if found >= 0 {
				return 0, &ChoiceError{path, choice, disks}
			}
			found = i
		}
	}
	if found < 0 {
		return 0, &ChoiceError{path, choice, disks}
	}
	return found, nil
}

// openAppliance opens the disk that the address of an appliance selects.
func (o *Opener) openAppliance(ctx context.Context, at address.Appliance) (source.Disk, error) {
	a, folder, err := o.appliance(ctx, at.Path)
	if err != nil {
		return nil, err
	}
	d, err := o.openApplianceDisk(ctx, a, folder, at.Path, at.Choice)
	if err != nil {
		a.Close()
		return nil, err
	}
	return d, nil
}

// openApplianceDisk opens a disk of the appliance a, which is at the given path. The
// parameter choice is the number or the name of the disk. If the appliance is an .ovf
// file, the parameter folder is the Opener for the files that the .ovf file names. For
// an .ova archive, folder is nil.
func (o *Opener) openApplianceDisk(ctx context.Context, a *ova.Appliance, folder source.Opener, path, choice string) (source.Disk, error) {
	disks := entries(a)
	i, err := pick(path, choice, disks)
	if err != nil {
		return nil, err
	}
	e := &disks[i]
	if !isRead(e.Format) {
		return nil, notRead(path, e)
	}
	f, err := a.OpenDisk(ctx, i)
	if err != nil {
		return nil, err
	}
	d := &applianceDisk{Disk: f, appliance: a}
	if e.File == "" {
		return d, nil
	}
	size := f.Size()
	shown := image.PathOf(f, e.File)
	if size == 0 {
		f.Close()
		return nil, fmt.Errorf("%s: the file is empty (0 bytes), want a disk image", shown)
	}
	d.Disk, err = o.openImage(ctx, f, shown, e.Format, func() (source.Opener, error) {
		switch file, ok := f.(*raw.Disk); {
		case folder == nil:
			return o.inArchive(a, shown, e.File, nil)
		case ok:
			return d.referencesOf(o, file, shown, e.File)
		}
		return func(_ context.Context, from, name, _ string) (source.Disk, error) {
			return nil, fmt.Errorf("%s refers to the file %q, but an image that is split into chunks cannot refer to other files", from, name)
		}, nil
	})
	if err != nil {
		return nil, err
	}
	if described, ok := source.Ability[source.Described](d.Disk); ok && described.Info().Format == "raw" {
		if err := a.CheckRaw(i, size); err != nil {
			return nil, errors.Join(err, d.Disk.Close())
		}
	}
	d.warnings = a.Warnings(i, size, d.Size())
	if w, ok := source.Ability[Warned](d.Disk); ok {
		d.warnings = append(d.warnings, w.Warnings()...)
	}
	return d, nil
}

// inArchive returns the source.Opener for the files to which an image in an archive
// refers. This source.Opener opens only files of the same archive. The parameter member
// is the name of the image in the archive. Errors call the image by the name in the
// parameter shown. The parameter children is the chain of images that led to this
// image: first the image that was opened directly, and last the image that names this
// one. It is empty if this image was opened directly.
func (o *Opener) inArchive(a *ova.Appliance, shown, member string, children chain) (source.Opener, error) {
	images, err := children.extend(shown, link{member: member})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, from, name, format string) (source.Disk, error) {
		f, named, err := a.OpenFile(ctx, member, name)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s refers to the file %q, but an image in an archive may refer only to files in this archive: %w", from, name, err)
		}
		if err != nil {
			return nil, err
		}
		path := image.PathOf(f, named)
		return o.openImage(ctx, f, path, format, func() (source.Opener, error) { return o.inArchive(a, path, named, images) })
	}, nil
}

// applianceDisk is a disk of an appliance. It wraps the disk that the reader of the
// image format returned, and adds warnings and the ability Manifest. It is a
// source.Wrapper, so that callers also find the abilities of the wrapped disk. Its
// Close also closes the appliance.
type applianceDisk struct {
	source.Disk
	appliance *ova.Appliance
	warnings  []string
	// The list named has the extents and data files that the image names, with paths
	// relative to the folder of the descriptor. The string unchecked is the path of the
	// parent or backing file of the image, or "" if the image has no parent. For an
	// image with a parent, VerifyManifest returns an error, because it does not know
	// which files the parent names.
	named     []string
	unchecked string
}

// referencesOf returns the source.Opener for the files that the image in f names. This
// source.Opener records their names for VerifyManifest. The parameter file is the name
// of the image in the descriptor of the appliance. Errors call the image by the name in
// the parameter shown.
func (d *applianceDisk) referencesOf(o *Opener, f *raw.Disk, shown, file string) (source.Opener, error) {
	opens, err := o.references(f, shown, nil)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, from, name, format string) (source.Disk, error) {
		x, err := opens(ctx, from, name, format)
		switch {
		case err != nil:
			return nil, err
		case format != "raw":
			d.unchecked = image.PathOf(x, name)
		case filepath.IsAbs(name):
			d.named = append(d.named, name)
		default:
			d.named = append(d.named, filepath.Join(filepath.Dir(file), name))
		}
		return x, nil
	}, nil
}

func (d *applianceDisk) Unwrap() source.Disk { return d.Disk }

func (d *applianceDisk) Close() error {
	return errors.Join(d.Disk.Close(), d.appliance.Close())
}

func (d *applianceDisk) Warnings() []string { return d.warnings }

func (d *applianceDisk) VerifyManifest(ctx context.Context) error {
	if err := d.appliance.Verify(ctx, d.named...); err != nil {
		return err
	}
	if d.unchecked != "" {
		return fmt.Errorf("cannot verify %s: an image refers to the file, but the descriptor does not list it: %w", d.unchecked, ErrNoManifest)
	}
	return nil
}
