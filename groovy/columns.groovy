/**
 * Makes QuPath's objects from arrays, in bulk: one call from Python instead of millions.
 *
 * Compiled by patchcl_qupath/project/jvm.py in QuPath's own JVM; not a script to run in QuPath.
 */

import groovy.transform.CompileStatic
import qupath.lib.measurements.MeasurementList
import qupath.lib.measurements.MeasurementListFactory
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs
import qupath.lib.roi.interfaces.ROI

@CompileStatic
class Columns {

    /**
     * N polygons as annotations or detections. x and y are the vertices of all polygons, one polygon after the other;
     * ends[k] is the index after the last vertex of polygon k; ids are the N UUIDs as 2 N halves; values are N rows
     * with one number for each name; codes are the numbers of the N classes.
     */
    static List<PathObject> toObjects(double[] x, double[] y, int[] ends, long[] ids, String[] names, float[] values,
                                      PathClass[] pathClasses, int[] codes, boolean annotations) {
        ImagePlane plane = ImagePlane.getDefaultPlane()
        List<PathObject> objects = new ArrayList<>(ends.length)
        int start = 0
        for (int k = 0; k < ends.length; k++) {
            int end = ends[k]
            ROI roi = ROIs.createPolygonROI(Arrays.copyOfRange(x, start, end), Arrays.copyOfRange(y, start, end), plane)
            start = end
            MeasurementList measurements = MeasurementListFactory.createMeasurementList(
                    names.length, MeasurementList.MeasurementListType.FLOAT)
            for (int i = 0; i < names.length; i++)
                measurements.put(names[i], values[k * names.length + i])
            measurements.close()
            PathClass pathClass = pathClasses[codes[k]]
            PathObject pathObject = annotations ?
                    PathObjects.createAnnotationObject(roi, pathClass, measurements) :
                    PathObjects.createDetectionObject(roi, pathClass, measurements)
            pathObject.setID(new UUID(ids[2 * k], ids[2 * k + 1]))
            objects.add(pathObject)
        }
        return objects
    }
}
