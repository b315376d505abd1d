package vmdk

import (
	"fmt"
	"math/bits"

	"github.com/vddkcp/vddkcp/source"
)

// openSparse takes f, which begins with a sparse header, as the extent that
// has want bytes of the disk (0: what the header says).
func openSparse(name string, f source.Disk, want int64) (*sparse, error) {
	h, footer, err := findHeader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	first, err := readHeader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s := &sparse{name: name, file: f, fileSize: f.Size(), fileKind: kindSparse, header: h, entryShift: 2}
	s.fixed = append(first.regions(s.fileSize), region{"footer", footer, footer + headerSize})
	if footer == 0 {
		s.fixed = s.fixed[:len(s.fixed)-1]
	}
	if err := s.init(want, footer); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// init checks the header, which is at the offset footer or, where that is 0,
// at the start of the file.
func (s *sparse) init(want, footer int64) error {
	if err := s.check(s.fileSize); err != nil {
		return err
	}
	if err := s.fit(want); err != nil {
		return err
	}
	s.metadata = append([]region{{"metadata (overHead)", 0, max(int64(s.overhead), 1) * sectorSize}}, s.fixed...)
	if s.flags&flagRedundant != 0 && s.redundantOffset != 0 {
		// Damage of the redundant directory matters only where the primary one
		// is damaged as well.
		s.redundant, _ = s.locate("redundant grain directory", s.redundantOffset)
	}
	if s.redundant.at == 0 && !s.hasDirectory() && s.marked() {
		end, err := streamEnd(s.file, footer)
		if err == nil {
			err = s.readMarkers(end)
		}
		if err != nil {
			return fmt.Errorf("it has no grain directory, and without one only a whole stream can be read: %w", err)
		}
		return nil
	}
	return s.initDirectories()
}

// fit sets the sizes, of a header that is checked, to have want bytes of the
// disk (0: what the header says).
func (s *sparse) fit(want int64) error {
	s.grainSize = int64(s.grain) * sectorSize
	s.grainShift = uint(bits.TrailingZeros64(uint64(s.grainSize)))
	s.size = int64(s.capacity) * sectorSize
	if want > 0 {
		// Some writers round the capacity up to whole grains. Any other
		// difference would move what follows, or leave a gap.
		if want > s.size || s.size-want >= s.grainSize {
			return fmt.Errorf("its header has a capacity of %d sectors, the descriptor gives the extent %d", s.capacity, want/sectorSize)
		}
		s.size = want
	}
	return nil
}

// emptySlack is how many bytes the file of an empty disk may have behind its
// metadata and a directory: markers, a footer, and what a transfer has added.
const emptySlack = footerSearch

// regions are the parts of a file of fileSize bytes that the header at its
// start occupies or names, in which no grain directory or table can be.
func (h *header) regions(fileSize int64) []region {
	all := []region{{"header", 0, headerSize}}
	limit := uint64(fileSize) / sectorSize
	if h.descriptorSize > 0 && h.descriptorOffset > 0 && h.descriptorOffset <= limit && h.descriptorSize <= limit {
		all = append(all, region{"descriptor", int64(h.descriptorOffset) * sectorSize, int64(h.descriptorOffset+h.descriptorSize) * sectorSize})
	}
	return all
}

// locate returns the grain directory that the header puts at sector, or why it
// cannot be there.
func (s *sparse) locate(what string, sector uint64) (directory, error) {
	at, err := s.directory(what, sector, s.fileSize)
	if err != nil {
		return directory{}, err
	}
	end := at + s.tables()<<s.entryShift
	if r, ok := within(s.fixed, at, end); ok {
		return directory{}, fmt.Errorf("the %s at sector %d, bytes %d to %d of the file, lies in the %s, bytes %d to %d: the header is damaged", what, sector, at, end, r.what, r.start, r.end)
	}
	return directory{what: what, at: at}, nil
}

// initDirectories finds the grain directory of a hosted sparse extent, whose
// redundant one is found already, if there is one.
func (s *sparse) initDirectories() error {
	primary, err := s.locate("grain directory", s.directoryOffset)
	switch {
	case err == nil:
	case s.redundant.at == 0:
		return err
	default:
		s.warn("all grain tables are read through the redundant grain directory at offset %d: %w", s.redundant.at, err)
		primary, s.redundant = s.redundant, directory{}
	}
	s.primary = primary
	size := s.tables() << s.entryShift
	own := region{primary.what, primary.at, primary.at + size}
	s.fixed, s.metadata = append(s.fixed, own), append(s.metadata, own)
	if r := s.redundant.at; r == primary.at {
		s.redundant = directory{} // one directory under two names
	} else if r != 0 {
		other := region{s.redundant.what, r, r + size}
		if err := disjoint([]region{own, other}); err != nil {
			return err
		}
		s.fixed, s.metadata = append(s.fixed, other), append(s.metadata, other)
	}
	return s.indexTables()
}

// compareDirectories finds out whether the redundant directory has what the
// primary one lacks, and says so in a warning.
func (s *sparse) compareDirectories() {
	n := int64(0)
	var first error
	s.eachTable(func(i int64, read func(*directory) (int64, error)) {
		at, err := read(&s.primary)
		if why := s.replaced[i]; why != nil {
			at, err = 0, why
		}
		if err == nil && at != 0 {
			return
		}
		redundant, damaged := read(&s.redundant)
		if damaged != nil || redundant == 0 && err == nil {
			return
		}
		if n++; n > 1 {
			return
		}
		if first = err; err == nil {
			first = fmt.Errorf("the grain directory's entry at offset %d, of grain table %d, is 0, and in the redundant grain directory it is not", s.primary.at+i<<s.entryShift, i)
		}
	})
	if n > 0 {
		s.fallback = true
		s.warn("the grain directory is damaged: %d of %d grain tables are read through the redundant grain directory; the first: %w", n, s.tables(), first)
	}
}
