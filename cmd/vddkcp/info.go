package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"vddkcp/internal/bytesize"
	"vddkcp/source"
)

type infoCommand struct {
	Src  string `arg:"" name:"SRC" help:"The disk: a VMDK, a raw file or a block device."`
	JSON bool   `name:"json" help:"Print JSON."`
	sourceFlags
}

// imageInfo is what info tells of a disk, and its JSON, by docs/cli.md.
type imageInfo struct {
	Source      string        `json:"source"`
	Format      string        `json:"format"`
	Subformat   string        `json:"subformat,omitempty"`
	VirtualSize int64         `json:"virtual_size"`
	SectorSize  int64         `json:"sector_size"`
	Allocated   int64         `json:"allocated"`
	ClusterSize int64         `json:"cluster_size"`
	Backing     *string       `json:"backing"`
	Identity    *diskIdentity `json:"identity"`

	CID          string        `json:"cid,omitempty"`
	AdapterType  string        `json:"adapter_type,omitempty"`
	HWVersion    string        `json:"hardware_version,omitempty"`
	ToolsVersion string        `json:"tools_version,omitempty"`
	UUID         string        `json:"uuid,omitempty"`
	Geometry     *diskGeometry `json:"geometry,omitempty"`
	Chain        []string      `json:"chain,omitempty"`
	Extents      []imageExtent `json:"extents,omitempty"`
}

type diskIdentity struct {
	ID    string `json:"id"`
	Proof string `json:"proof"`
}

type diskGeometry struct {
	Cylinders int64 `json:"cylinders"`
	Heads     int64 `json:"heads"`
	Sectors   int64 `json:"sectors"`
}

type imageExtent struct {
	Kind   string  `json:"kind"`
	Size   int64   `json:"size"`
	Path   *string `json:"path"`
	Offset int64   `json:"offset"`
}

func (c *infoCommand) Run(ctx context.Context, logs *logFlags) error {
	// An appliance has several disks: what lists them will be asked here, by
	// its address, before one disk is opened.
	src, done, err := c.open(ctx, c.Src, logs)
	if err != nil {
		return err
	}
	defer done()
	info, err := describeImage(ctx, c.Src, src)
	if err != nil {
		return fmt.Errorf("info %s: %w", c.Src, err)
	}
	print := info.printText
	if c.JSON {
		print = info.printJSON
	}
	if err := print(standardOutput(ctx)); err != nil {
		return fmt.Errorf("info %s: %w", c.Src, err)
	}
	return nil
}

// describeImage asks the disk at address for all that it can tell.
func describeImage(ctx context.Context, address string, d source.Disk) (*imageInfo, error) {
	i := &imageInfo{Source: address, VirtualSize: d.Size()}
	if identified, ok := source.Ability[source.Identified](d); ok {
		id, proof, err := identified.Identity(ctx)
		if err != nil {
			return nil, err
		}
		i.Identity = &diskIdentity{id, proof}
	}
	described, ok := source.Ability[source.Described](d)
	if !ok {
		return i, nil
	}
	info := described.Info()
	i.Format, i.Subformat = info.Format, info.Subformat
	i.SectorSize, i.Allocated, i.ClusterSize = info.LogicalSector, info.Allocated, info.ClusterSize
	i.CID, i.AdapterType, i.UUID = info.CID, info.AdapterType, info.UUID
	i.HWVersion, i.ToolsVersion = info.HWVersion, info.ToolsVersion
	if g := info.Geometry; g != [3]int64{} {
		i.Geometry = &diskGeometry{g[0], g[1], g[2]}
	}
	if i.Chain = info.Chain; len(i.Chain) > 1 {
		i.Backing = &i.Chain[1]
	}
	for _, p := range info.Parts {
		e := imageExtent{Kind: p.Kind, Size: p.Size, Offset: p.Offset}
		if p.Path != "" {
			e.Path = &p.Path
		}
		i.Extents = append(i.Extents, e)
	}
	return i, nil
}

func (i *imageInfo) printJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(i)
}

// printText prints what there is, a line each, for people.
func (i *imageInfo) printText(out io.Writer) error {
	w := bufio.NewWriter(out)
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(w, "%-17s %s\n", key, value)
		}
	}
	text := func(key, value string) { line(key, printable(value)) }
	text("source:", i.Source)
	text("format:", i.Format)
	text("subformat:", i.Subformat)
	line("virtual size:", bothSizes(i.VirtualSize))
	line("allocated:", bothSizes(i.Allocated))
	if i.SectorSize > 0 {
		line("sector size:", bothSizes(i.SectorSize))
	}
	if i.ClusterSize > 0 {
		line("cluster size:", bothSizes(i.ClusterSize))
	}
	text("CID:", i.CID)
	text("UUID:", i.UUID)
	text("adapter type:", i.AdapterType)
	text("hardware version:", i.HWVersion)
	text("tools version:", i.ToolsVersion)
	if g := i.Geometry; g != nil {
		line("geometry:", fmt.Sprintf("%d cylinders, %d heads, %d sectors", g.Cylinders, g.Heads, g.Sectors))
	}
	if i.Identity != nil {
		line("identity:", fmt.Sprintf("%s (proof: %s)", printable(i.Identity.ID), i.Identity.Proof))
	}
	if i.Backing != nil {
		text("backing:", *i.Backing)
		for n, path := range i.Chain {
			text([]string{"chain:", ""}[min(n, 1)], path)
		}
	}
	for n, e := range i.Extents {
		line([]string{"extents:", ""}[min(n, 1)], e.String())
	}
	return w.Flush()
}

func (e *imageExtent) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s %s", printable(e.Kind), bothSizes(e.Size))
	if e.Path != nil {
		s.WriteString(" " + printable(*e.Path))
	}
	if e.Offset > 0 {
		fmt.Fprintf(&s, ", from byte %d on", e.Offset)
	}
	return s.String()
}

// bothSizes prints n bytes for people and as they are.
func bothSizes(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%s (%d bytes)", bytesize.Format(n), n)
}
